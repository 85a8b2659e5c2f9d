"""A saved run goes on in another process exactly as it would have gone on without, while both use one MINT_HOME."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.support.clients import GUARD, checkpoint_folder, child, embedded, train

GO_ON = """
    import hashlib, json, sys
    from pathlib import Path
    from tests.support.clients import GUARD, embedded, train

    home, report = Path(sys.argv[1]), {}
    for dtype, path in json.loads(sys.argv[2]).items():
        with embedded(home, dtype=dtype) as world:
            client = world.client()
            listed = client.create_rest_client().list_user_checkpoints().result(GUARD).checkpoints
            exact = client.create_training_client_from_state_with_optimizer(path)
            weights = client.create_training_client_from_state(path)
            report[dtype] = {
                "listed": [checkpoint.tinker_path for checkpoint in listed],
                "exact": train(exact, 3, first=3).tobytes().hex(),
                "weights only": train(weights, 3, first=3).tobytes().hex(),
                "final": exact.save_state("final").result(GUARD).path,
            }
    print(json.dumps(report))
"""


DTYPES = ("float32", "bfloat16")


def test_saved_and_resumed_in_a_new_process_equals_uninterrupted(mint_home: Path, tiny_model: str) -> None:
    uninterrupted, middle, final = {}, {}, {}
    for dtype in DTYPES:
        with embedded(mint_home, dtype=dtype) as world:
            run = world.client().create_lora_training_client(tiny_model, rank=4, seed=0)
            train(run, 3)
            middle[dtype] = run.save_state("middle").result(GUARD).path
            uninterrupted[dtype] = train(run, 3, first=3)
            final[dtype] = run.save_state("final").result(GUARD).path
    with embedded(mint_home) as world:  # in use while the other process works in the same folder
        run = world.client().create_lora_training_client(tiny_model, rank=4, seed=1)
        done = child(GO_ON, str(mint_home), json.dumps(middle))
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        train(run, 1)
        own = run.save_state("own").result(GUARD).path
        listed = world.rest().list_user_checkpoints().result(GUARD).checkpoints
    for dtype in DTYPES:
        found = report[dtype]
        assert {*middle.values(), *final.values()} <= set(found["listed"])
        assert found["exact"] == uninterrupted[dtype].tobytes().hex()
        assert found["weights only"] != found["exact"]
        here, there = (checkpoint_folder(mint_home, path) for path in (final[dtype], found["final"]))
        for name in ("adapter_model.safetensors", "optimizer.safetensors"):
            one, other = load_file(here / name), load_file(there / name)
            assert one.keys() == other.keys()
            assert all(np.array_equal(one[key], other[key]) for key in one)
    assert {c.tinker_path for c in listed} == {
        own, *middle.values(), *final.values(), *(report[dtype]["final"] for dtype in DTYPES)
    }  # fmt: skip
