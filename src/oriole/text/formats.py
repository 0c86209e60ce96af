from dataclasses import dataclass
@dataclass(frozen=True)
class Doc:
    text: str
    lang: str = ""
    source: str = ""
