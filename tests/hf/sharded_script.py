"""Run by test_sharded.py in two processes: a patched model under FSDP2, by accelerate over meta tensors."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from conftest import apply, strong, token_ids
from torch.distributed import init_process_group
from torch.distributed.device_mesh import init_device_mesh

import rope_scaling


class Mesh:
    """What accelerate asks for by the names of its dimensions."""

    def __init__(self, world):
        self.mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp_shard",))

    def __getitem__(self, names):
        return self.mesh


def prepared(model, rank, world):
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=True,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=Mesh(world),
        parallelism_config=SimpleNamespace(fsdp_dim_names=("dp_shard",)),
        mixed_precision="no",
        is_main_process=rank == 0,
        device=torch.device("cpu"),
        process_index=rank,
        num_processes=world,
    )
    return fsdp2_prepare_model(accelerator, model)


def main():
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    init_process_group("gloo")
    case, chunked = sys.argv[1], sys.argv[2] == "chunked"
    model = apply(strong("llama"), case)
    if chunked:
        rope_scaling.use_chunked_loss(model, 16)
    ids = token_ids(150, rows=2)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    loss = model(**inputs).loss
    loss.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    frequencies = model.model.rotary_emb.inv_freq.clone()
    model = prepared(model, rank, world)
    found = model(**inputs).loss
    found.backward()
    differences = [float((p.grad.full_tensor() - wanted[name]).abs().max()) for name, p in model.named_parameters()]
    if rank == 0:
        kept = torch.equal(model.model.rotary_emb.inv_freq, frequencies)
        print(json.dumps({"kept": kept, "loss": abs(float(found - loss)), "gradients": max(differences)}))


if __name__ == "__main__":
    main()
