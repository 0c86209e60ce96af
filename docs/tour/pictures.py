"""The tour's pictures, drawn from what a model computes: python docs/tour/pictures.py RUN FOLDER

Those in docs/tour/images are of the model that `oriole demo` trains.
"""

import sys
from pathlib import Path

from oriole import Oriole
from oriole.apps import insidedraw as draw
from oriole.apps.inside import InsideConfig, describe
from oriole.apps.insidepage import depths, lens_cells, stream_curves

TEXT = "黄鹂是一种鸟。An oriole is a bird."
QUESTION = "What is 30 + 12?"
WORDS = "一 二 三 四 五 one two three four five 1 2 3 4 5 红 黄 蓝 red yellow blue 猫 狗 鸟 cat dog bird"


def main(run: str, folder: str) -> None:
    """Write every picture of the tour into `folder`."""
    model, out = Oriole(run), Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    text = describe(model, TEXT, InsideConfig(mode="text"))
    words = describe(model, WORDS, InsideConfig(mode="text"))
    answer = describe(model, QUESTION, InsideConfig(mode="question" if model.can_chat else "text", answer=20))
    labels = [token["text"] for token in text["tokens"]]
    by_id = {token["id"]: token for token in words["tokens"]}
    pictures = {"tokens": draw.strip(text["tokens"], text["split"])}
    if plane := words["embedding"]["map"]:
        shown = [(p, by_id[i]) for i, p in zip(plane["ids"], plane["points"], strict=True)]
        shown = [(p, token) for p, token in shown if token["kind"] != "bytes"] or shown
        points, tokens = zip(*shown, strict=True)
        pictures["plane"] = draw.plane(
            points, [t["text"] for t in tokens], [t["kind"] for t in tokens], "embeddings of a few words, by PCA"
        )
    pictures["attention"] = draw.attention_map(text["attention"][1][0], labels, "a head of the second layer")
    pictures["stream"] = draw.layers_chart(stream_curves(text), "Euclidean norm")
    said = [token["text"] for token in answer["tokens"]]
    start = max(0, answer["written"] - 2)
    cells = [row[start:] for row in lens_cells(reversed(answer["lens"]))]
    pictures["lens"] = draw.grid(cells, depths(answer), said[start:], "the likeliest next token at each depth")
    for name, svg in pictures.items():
        (out / f"{name}.svg").write_text(draw.alone(svg), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
