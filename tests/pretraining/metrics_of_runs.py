"""What the metrics of a pre-training run say."""

import json


def losses(run):
    """Loss (and norm of the gradient) by step, as metrics.jsonl has them."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [record for record in records if record["kind"] == "training"]
    return {record["step"]: (record["loss"], record["gradient_norm"]) for record in found}
