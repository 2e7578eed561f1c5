"""All hostile programs, by technique."""

from __future__ import annotations

from attacks.arguments import ALLOWED_WITH_HOSTILE_ARGUMENTS, INDIRECT
from attacks.bypasses import ARCHIVES, PUBLISHED, SPELLINGS
from attacks.functions import DOTTED, FUNCTIONS
from attacks.opcodes import MEMO_TRICKS, OPCODES

TECHNIQUES = {
    "opcodes and protocols": OPCODES,
    "memo and stack": MEMO_TRICKS,
    "functions": FUNCTIONS,
    "published bypasses": PUBLISHED,
    "dotted names": DOTTED,
    "spellings": SPELLINGS,
    "calls by way of others": INDIRECT,
    "pickles inside": ARCHIVES,
    "allowed names, hostile arguments": ALLOWED_WITH_HOSTILE_ARGUMENTS,
}
HOSTILE = [case for cases in TECHNIQUES.values() for case in cases]
