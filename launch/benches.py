"""The benchmarks that only a clone has, since they compare parts of the package with other libraries and with tests."""

from jaxinfra.cli.arguments import BENCHES, BenchmarkSpec

CLONE_BENCHES = {
    "parallel": BenchmarkSpec(
        summary="the train step on every mesh axis and pipeline schedule, on 8 emulated devices, against fsdp=8",
        parts=("axes", "experts", "schedules"),
        package="tests.bench",
    ),
    "canonical": BenchmarkSpec(
        summary="the train step with train.canonical=8 against plain training on the same mesh: time, memory, bytes",
        parts=("fsdp", "replica"),
        package="tests.bench",
    ),
    "processes": BenchmarkSpec(
        summary="2 processes with a device each against 1 process with 2: step, start, a killed process, restart",
        parts=("step", "start", "kill"),
        package="tests.bench",
    ),
    "slices": BenchmarkSpec(
        summary="the train step on two slices with a slow link between them: bytes over the link, with and without "
        "mesh.replica",
        parts=("replica", "fsdp"),
        package="tests.bench",
    ),
    "llama": BenchmarkSpec(
        summary="the step of Llama 3.1 8B compiled for 64 TPU v5p chips: memory and cycles, beside other results",
        parts=("full", "dots", "best"),
        options=(),
        package="tests.bench",
    ),
    "data": BenchmarkSpec(
        summary="batches of random sequences by jaxinfra, TensorStore, Grain and PyTorch; first batch; memory",
        parts=("speed", "first", "memory"),
        options=("pairs", "tokens"),
        package="tests.bench",
    ),
    "checkpoint": BenchmarkSpec(
        summary="saving and restoring a state of 1 GB by jaxinfra, plain Orbax, TensorStore and raw writes",
        parts=("jaxinfra", "compress", "copy", "orbax", "tensorstore", "raw"),
        options=("pairs", "megabytes"),
        package="tests.bench",
    ),
    "hub": BenchmarkSpec(
        summary="published weights of 1 GB read onto a device and written, against raw reads and writes",
        parts=("read", "write"),
        options=("pairs", "megabytes"),
        package="tests.bench",
    ),
    "prepare": BenchmarkSpec(
        summary="tokenization by data prepare and by datasets.map, with one worker and two",
        parts=("prepare", "map"),
        options=("pairs", "text"),
        package="tests.bench",
    ),
}


def add_benches() -> None:
    """Adds them to those of the package."""
    BENCHES.update(CLONE_BENCHES)
