"""What a run will take before it is started: parameters, operations, memory, communication, data, time.

    meter-fast plan pretrain gpu=a100-80g nodes=8 gpus_per_node=8 engine.micro_batch=32
    meter-fast plan retrieval_coco gpu=h100-80g nodes=1 --out plans/coco --json plans/coco.json

Everything is arithmetic and shapes: no GPU, no weights, no download. `options` are the arguments, `machine` the figures
of GPUs and links, `step` what one step computes, `memory` what fits, `communication` what is sent, `timing` what it
takes, `supply` what the data are, `ranking` the test of retrieval, `planned` all of it together, `page` and `chart`
show it.
"""

from meter_fast.plan.planned import make_plan

__all__ = ["make_plan"]
