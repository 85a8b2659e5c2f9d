"""How long one datum of a tenant waits while another tenant has a thousand queued; one JSON line.

In units of a full pass of the busy tenant: 1 is the pass that was going on, and another 1 the pass that the datum shares.
"""

from __future__ import annotations

import argparse
import json
import time
from unittest import mock

from peers import BASE_MODEL, RANK, machine, spread
from sft import datum

import mint
from mint import settings
from mint.client.connect import make_backend
from mint.data import load_demo
from mint.local.core import Core
from mint.local.service import LocalService

QUEUED = 1000


def client_of(core: Core, tenant: str) -> mint.TrainingClient:
    with mock.patch("mint.client.service_client.connect", lambda *_: LocalService(core, tenant)):
        service = mint.ServiceClient()
    return service.create_lora_training_client(BASE_MODEL, rank=RANK, seed=0, train_unembed=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datums", type=int, default=6, help="single datums, one after the other")
    args = parser.parse_args()
    core = Core(settings.load(), make_backend)
    busy, patient = client_of(core, "busy"), client_of(core, "patient")
    tokenizer, most = busy.get_tokenizer(), busy.get_info().max_tokens_per_pass or 0
    rows = [tokenizer.apply_chat_template(row, return_dict=False) for row in load_demo()[0]]
    single, pass_rows, total = datum(rows[0]), [], 0
    for row in rows:
        if total + len(row) - 1 > most:
            break
        pass_rows.append(row)
        total += len(row) - 1
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        busy.forward_backward([datum(row) for row in pass_rows]).result()
        seconds.append(time.perf_counter() - started)
    queued = busy.forward_backward([datum(rows[i % len(rows)]) for i in range(QUEUED)])
    time.sleep(min(seconds) / 2)
    delays = []
    for _ in range(args.datums):
        started = time.perf_counter()
        patient.forward_backward([single]).result()
        delays.append((time.perf_counter() - started) / min(seconds[1:]))
    assert not queued.done(), "the queue was empty before the last datum came"
    core.close()
    result = {
        "benchmark": "fairness",
        "queued_datums": QUEUED,
        "delay_in_passes": spread(delays),
        "seconds_of_a_pass": round(min(seconds[1:]), 2),
        "tokens_of_a_pass": total,
        **machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
