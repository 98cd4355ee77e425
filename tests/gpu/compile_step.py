"""Compiles a training step for an NVIDIA H100 on a machine that has none; see test_compile.py.

python compile_step.py 'model.residual="convshort"' data.image_size=32 ...
"""

import ast
import functools
import os
import sys

# Kernels are chosen by measuring them, for which a device is needed.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from nfjax import config as configs
from nfjax.training import networks, optimizers, preprocessing, schedules, sharding
from nfjax.training import step as steps
from nfjax.training.state import Batch, Steps, TrainState

CLASSES, EXAMPLES, STEPS = 10, 1024, 50
# What XLA wants to know of a GPU, from NVIDIA's data sheet of the H100 SXM5 and the tuning guide of its architecture.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  memory_bandwidth: 3350000000000  l2_cache_size: 52428800  device_memory_size: 85899345920
}
platform_name: "CUDA"
dnn_version_info { major: 9  minor: 10 }
"""


def main(changes):
    config = configs.base()
    config.update_from_flattened_dict(changes)
    described = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H100)
    devices = np.array(described.devices[:1]).reshape(1, 1)
    mesh = Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 2)
    network, params, batch_stats = networks.as_functions(networks.shapes(config, CLASSES))
    optimizer = optimizers.build(config, schedules.build(config, [100, 200]))
    state = jax.eval_shape(functools.partial(TrainState.start, optimizer=optimizer), params, batch_stats)
    size = config.data.image_size
    shapes = (EXAMPLES, size, size, 3), (EXAMPLES,), (EXAMPLES,)
    examples = Batch(*map(jax.ShapeDtypeStruct, shapes, (jnp.uint8, jnp.int32, jnp.float32)))
    indices = jax.ShapeDtypeStruct((STEPS, config.batch_size), jnp.int32)
    work = Steps(examples, indices, jax.ShapeDtypeStruct((), jnp.int32))
    here = sharding.replicated(mesh)
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        (state, work, jax.eval_shape(lambda: jax.random.key(0))),
    )
    task = steps.Task(network, optimizer, preprocessing.make_preprocess(config), mesh=mesh)
    steps.train_steps.trace(*arguments, task=task).lower().compile()


if __name__ == "__main__":
    pairs = (argument.split("=", 1) for argument in sys.argv[1:])
    main({name: ast.literal_eval(value) for name, value in pairs})
