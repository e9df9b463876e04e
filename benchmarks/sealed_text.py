"""An endpoint that returns only text and serves the original weights to whoever sends published probes: what one sealed draw says of it.

As a user would, with the installed commands: a key, a pool generated from it, its candidates recorded and chosen from, a bundle of the chosen ones on
`HONEST` and `DEPARTURES`, and audits over HTTP of lab endpoints on llama.cpp. Q4_0 is not recorded there; the honest endpoint is, so that it is
consistent says little of engines that nobody recorded. The same endpoints are asked for the public pools as well.

    python benchmarks/sealed_text.py [--seed 1] [--json]

Needs the extras lab and hf; half an hour on two cores beside another benchmark. Bundles and runs stay under .benchmarks-cache/sealed/; with what is on the disk
nothing is asked again.
"""

import argparse
import dataclasses
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import CACHE, Document, Figure, say
from weighbridge.lab.front import MODEL_NAME, Lies
from weighbridge.lab.provider import lab_endpoint
from weighbridge.lab.variants import VARIANTS

EMBEDDED = "smollm2-135m-instruct"
CANDIDATES, KEPT_FOR_LOGPROBS, KEPT_FOR_TEXT = 700, 60, 80
REFERENCE = 'id = "hf-float32"\ndescription = "the reference"\nlocal = { }'
HONEST = {
    "hf-bfloat16": 'local = { dtype = "bfloat16" }',
    "hf-bfloat16-eager": 'local = { dtype = "bfloat16", attention = "eager" }',
    "hf-float16": 'local = { dtype = "float16" }',
    "emulated-outputs": 'local = { module_outputs = "bfloat16" }',
    "llamacpp-f16": 'lab_variant = "f16"',
    "llamacpp-bf16": 'lab_variant = "bf16"',
}
DEPARTURES = {"int8": "int8", "fp8-e4m3": "fp8", "int4-g64": "int4", "nf4-g64": "int4", "mxfp4": "int4"}
SEEN = ("hf-bfloat16", "hf-bfloat16-eager", "int8", "int4-g64", "nf4-g64")  # by the choice of the probes
TEXT = Lies(max_top_logprobs=0)
# What serves, and how it lies; of the last one nothing has to be found.
SERVED = {
    "q4_0, the original weights for published probes": ("q4_0", dataclasses.replace(TEXT, true_for_public=True)),
    "q4_0": ("q4_0", TEXT),
    "f16": ("f16", TEXT),
}


def weighbridge(*arguments: str | Path, codes: Sequence[int] = (0,)) -> dict[str, Any]:
    """Run a command and read what it prints."""
    program = [sys.executable, "-c", "from weighbridge.cli import main; main()"]
    done = subprocess.run([*program, *map(str, arguments), "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in codes:
        raise SystemExit(f"`weighbridge {' '.join(map(str, arguments))}` ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def spec(folder: Path, name: str, pools: Sequence[str], stacks: Sequence[str]) -> Path:
    """Write the spec of a bundle."""
    text = [
        f'schema = "weighbridge/reference-spec/3"\nid = "{name}"\nversion = 1\nmodel = "SmolLM2-135M-Instruct"\nmodel_names = ["SmolLM2-135M-Instruct"]\nkeeper = "the Weighbridge project"\ntop_k = 128\nshard = 32',
        '[weights]\nsource = "The lab\'s model."\nprecision = "bfloat16"\nlab = true',
        *(f'[[pool]]\nname = "{pool}"' for pool in pools),
        f"[[stack]]\n{REFERENCE}",
        *(f'[[stack]]\nid = "{one}"\ndescription = "{one}"\n{HONEST[one]}' for one in stacks if one in HONEST),
        *(f'[[stack]]\nid = "{one}"\ndescription = "{one}"\ndeparture = "precision"\ndeparture_class = "{DEPARTURES[one]}"\nlocal = {{ weights = "{one}" }}' for one in stacks if one in DEPARTURES),
    ]  # fmt: skip
    path = folder / f"{name}.toml"
    path.write_text("\n\n".join(text) + "\n", "utf-8")
    return path


def sealed_bundle(folder: Path, seed: int) -> Path:
    """The bundle of a sealed pool, made as docs/REFERENCES.md says; of the key only that it comes from the seed is special."""
    bundle = folder / "sealed-bundle"
    if bundle.exists():
        return bundle
    folder.mkdir(parents=True, exist_ok=True)
    key, made = folder / "night.key", folder / "sealed-made"
    key.write_text(hashlib.sha256(f"sealed text {seed}".encode()).hexdigest() + "\n", "ascii")
    key.chmod(0o600)
    if not made.exists():
        weighbridge("pool", "generate", "--key-file", key, "--family", "chat", "--count", str(CANDIDATES), "--id", made.name, "--out", made)  # fmt: skip
    candidates = folder / "candidates"
    if not candidates.exists():
        say("recording the candidates")
        weighbridge("reference", "build", spec(folder, "sealed-candidates", [made.name], SEEN), "--out", candidates)
    text, logprobs = folder / "sealed-text", folder / "sealed-logprobs"
    choices: list[tuple[str, int, Path, list[str | Path]]] = [
        ("L4", KEPT_FOR_TEXT, text, []),
        ("L3", KEPT_FOR_LOGPROBS, logprobs, ["--exclude", text]),
    ]
    for level, count, chosen, exclude in choices:
        if not chosen.exists():
            weighbridge("pool", "select", candidates, "--level", level, "--count", str(count), "--id", chosen.name, "--sealed", *exclude, "--out", chosen)  # fmt: skip
    say("recording the sealed pools")
    weighbridge("reference", "build", spec(folder, "sealed", [logprobs.name, text.name], [*HONEST, *DEPARTURES]), "--out", bundle)  # fmt: skip
    return bundle


def audited(runs: Path, name: str, seed: int, references: dict[str, Path | str]) -> dict[str, dict[str, Any]]:
    """What an endpoint is said to serve, with each reference."""
    weights, lies = SERVED[name]
    slug = "".join(c if c.isalnum() else "-" for c in name)
    variant = VARIANTS[weights]
    runs.mkdir(parents=True, exist_ok=True)
    wanted = {pool: reference for pool, reference in references.items() if not (runs / f"{slug}-{pool}").exists()}
    if wanted:
        say(f"auditing {name}")
        with lab_endpoint(variant, lies, say) as front:
            file = runs / f"{slug}.toml"
            file.write_text(f'schema = "weighbridge/endpoint/1"\nname = "{slug}"\nbase_url = "{front.base_url}"\nmodel = "{MODEL_NAME}"\n', "utf-8")  # fmt: skip
            for pool, reference in wanted.items():
                weighbridge("audit", file, "--reference", reference, "--seed", str(seed), "--out", runs / f"{slug}-{pool}", codes=(0, 1, 3))  # fmt: skip
    found = {}
    for pool in references:
        verdict = json.loads((runs / f"{slug}-{pool}" / "verdict.json").read_text("utf-8"))
        found[pool] = {key: verdict[key] for key in ("verdict", "cause", "requests_sent", "sentence")}
    disagree = weighbridge("history", slug, "--runs", runs)["pools_disagree"]
    found["between pools"] = {"sentences": [one["sentence"] for one in disagree]}
    return found


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    folder = CACHE / "sealed" / str(arguments.seed)
    bundle = sealed_bundle(folder, arguments.seed)
    document = Document("sealed_text")
    rows = {
        name: audited(folder / "runs", name, arguments.seed, {"public": EMBEDDED, "sealed": bundle}) for name in SERVED
    }
    document.reported |= rows
    hiding, plain, honest = (rows[name] for name in SERVED)
    caught = hiding["public"]["verdict"] == "consistent" and hiding["sealed"]["verdict"] == "differs"
    named = any("inconsistent between pools" in sentence for sentence in hiding["between pools"]["sentences"])
    wrong = sum(honest[pool]["verdict"].startswith("differs") for pool in ("public", "sealed"))
    document.figures["recognising_endpoint_caught_by_one_sealed_draw"] = Figure(caught, "of 1", "1", caught)
    document.figures["named_inconsistent_between_pools"] = Figure(named, "of 1", "1", named)
    document.figures["requests_of_the_sealed_draw"] = Figure(hiding["sealed"]["requests_sent"], "requests", "<= 100", hiding["sealed"]["requests_sent"] <= 100)  # fmt: skip
    plainly = sum(plain[pool]["verdict"] == "differs" for pool in ("public", "sealed"))
    document.figures["the_same_weights_that_hide_nothing_differ"] = Figure(plainly, "of 2 pools", "2", plainly == 2)
    document.figures["honest_endpoint_differs"] = Figure(wrong, "of 2 pools", "0", wrong == 0)
    return document.print(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
