"""Masking of personal data: mail addresses, telephone numbers, Chinese identity numbers, public IP addresses.

Each kind has its own switch. The marks stand in angle brackets and are none of HTML's names, so no other rule changes
them: `<EMAIL>`, `<PHONE>`, `<ID>`, `<IP>`. FineWeb-2 masks mail and IP addresses (datatrove's PIIFormatter, with
made-up values in their place); telephone and identity numbers are what Chinese text leaks. Code is searched too.
"""

import ipaddress
import re
from functools import partial

from oriole.text.rulescode import Spans, code, inside

__all__ = ["mask_mail", "mask_numbers", "valid_id"]

_MAIL = re.compile(
    r"(?<![A-Za-z0-9._%+/:-])([A-Za-z0-9_][A-Za-z0-9._%+-]{0,63})@((?:[A-Za-z0-9-]{1,63}\.){1,6}[A-Za-z]{2,24})(?![\w@:/-])"
)
_EXAMPLES = (
    "example.com",
    "example.org",
    "example.net",
    "contoso.com",
    "fabrikam.com",
    ".example",
    ".test",
    ".invalid",
    ".local",
)
# What is surely a mail address where `a@b.c` may as well be a product of matrices: in code, and before a bracket.
_COMMON = frozenset(
    "com cn net org edu gov mil int info biz io ai me cc tv eu uk de fr jp kr ru us ca au tw hk sg nl ch se".split()
)
_LOGIN = re.compile(
    r"(?:^|[\s`$#>;&|(])(?:ssh|sftp|mosh|autossh|sshfs|ssh-copy-id)[ \t]+(?:-\S+[ \t]+(?:[^\s@-][^\s@]*[ \t]+)?){0,8}\Z"
)
_PHONE = re.compile(
    r"(?<![A-Za-z0-9_.@/=#-])(?:"
    r"(?:(?:\+|00)86[- ]?)?1[3-9]\d(?:\d{8}|[- ]\d{4}[- ]\d{4})"  # Chinese mobile
    r"|(?:(?:\+|00)86[- ]?)?0(?:10|2\d|[3-9]\d\d)-\d{7,8}(?:-\d{1,4})?"  # land line
    r"|[（(]0(?:10|2\d|[3-9]\d\d)[)）] ?\d{7,8}"
    r"|[48]00-\d{3}-\d{4}|[48]00-\d{4}-\d{3}"
    r"|(?:\+1[-. ]?)?(?:\([2-9]\d\d\) ?|[2-9]\d\d[-.])[2-9]\d\d[-.]\d{4}"  # North America
    r"|\+[1-9]\d{0,2}(?:[ -]\d{2,4}){3,5}"  # international, in groups
    r")(?![A-Za-z0-9_@/=-]|\.\d)"
)
_ID = re.compile(
    r"(?<![A-Za-z0-9_.])[1-9]\d{5}(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[0-9Xx](?![A-Za-z0-9_]|\.\d)"
)
_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_IPV4 = re.compile(r"(?<![A-Za-z0-9_.-])(?:\d{1,3}\.){3}\d{1,3}(?![A-Za-z0-9_-]|\.\d)")
_IPV6 = re.compile(r"(?<![A-Za-z0-9_:.])(?:[0-9A-Fa-f]{1,4}:){7}[0-9A-Fa-f]{1,4}(?![A-Za-z0-9_:])")
_VERSION = re.compile(r"(?:version|release|build|版本|版|[vV])[ :：=]*$", re.IGNORECASE)


def mask_mail(text: str) -> str:
    """Mail addresses become `<EMAIL>`; those of the domains kept for examples (RFC 2606) stay.

    So do logins, `git@host:path` and `ssh user@host`, and in code what ends in no common top-level domain, as
    `a@b.weight` and `a@b.to(device)` do: that is a product of matrices.
    """
    out: list[str] = []
    at = 0
    found = text.find("@")
    spans = code(text) if found >= 0 else ([], [])
    while found >= 0:  # only the lines with the sign are looked at
        start = text.rfind("\n", 0, found) + 1
        end = text.find("\n", found)
        end = len(text) if end < 0 else end
        out += text[at:start], _MAIL.sub(partial(_mail, spans, start), text[start:end])
        at = end
        found = text.find("@", end)
    return "".join(out) + text[at:] if out else text


def _mail(spans: Spans, start: int, m: re.Match[str]) -> str:
    """The mark, or the hit as it is; the line begins at `start` of the text whose code is `spans`."""
    if m[2].lower().endswith(_EXAMPLES) or m[1] == "git":
        return m[0]
    doubtful = m.string[m.end() : m.end() + 1] in ("(", "[") or inside(spans, start + m.start())
    if doubtful and m[2].rpartition(".")[2].lower() not in _COMMON:
        return m[0]
    return m[0] if _LOGIN.search(m.string[max(0, m.start() - 120) : m.start()]) else "<EMAIL>"


def valid_id(number: str) -> bool:
    """Whether the last of the 18 signs is the check digit of GB 11643-1999 (ISO 7064, MOD 11-2)."""
    total = sum(int(digit) * weight for digit, weight in zip(number[:17], _WEIGHTS, strict=True))
    return "10X98765432"[total % 11] == number[17].upper()


def mask_numbers(text: str, phones: bool = True, ids: bool = True, ips: bool = True) -> str:
    """Telephone numbers, identity numbers and IP addresses become `<PHONE>`, `<ID>` and `<IP>`, each a switch.

    Telephone: Chinese mobile and land lines, North American, and international ones in groups. Identity: 18 signs with
    a possible birthday and the right check digit. IP: public addresses (as datatrove), but not what follows a word for
    version, and not four numbers all below 64, which are more often a section of a standard or a version (1.2.3.4).

    Only lines with something like seven digits in a row are looked at closely.
    """
    raw = text.encode(errors="surrogatepass")
    out: list[bytes] = []
    at = seen = 0
    for m in _CANDIDATE.finditer(raw.translate(_DIGITS_AS_ZERO)):
        if m.start() < seen:
            continue
        start = raw.rfind(b"\n", 0, m.start()) + 1
        seen = raw.find(b"\n", m.end())
        seen = len(raw) if seen < 0 else seen
        line = before = raw[start:seen].decode(errors="surrogatepass")
        if ids:
            line = _ID.sub(lambda m: "<ID>" if valid_id(m[0]) else m[0], line)
        if phones:
            line = _PHONE.sub("<PHONE>", line)
        if ips:
            line = _IPV6.sub(lambda m: "<IP>" if _public(m[0]) else m[0], _IPV4.sub(_ipv4, line))
        if line != before:
            out += raw[at:start], line.encode(errors="surrogatepass")
            at = seen
    return b"".join((*out, raw[at:])).decode(errors="surrogatepass") if out else text


# In UTF-8 with every digit a zero: one byte is searched for several times faster than a class of ten characters.
_DIGITS_AS_ZERO = bytes(ord("0") if ord("0") <= byte <= ord("9") else byte for byte in range(256))
_CANDIDATE = re.compile("0(?:[0).: A-Fa-f-]|）)(?:[0().: A-Fa-f-]|（|）){4,}0".encode())


def _ipv4(m: re.Match[str]) -> str:
    if max(map(int, m[0].split("."))) < 64 or not _public(m[0]):
        return m[0]
    return m[0] if _VERSION.search(m.string[max(0, m.start() - 12) : m.start()]) else "<IP>"


def _public(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address)
        return ip.is_global and not ip.is_multicast
    except ValueError:
        return False
