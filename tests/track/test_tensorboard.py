import struct

from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from jaxinfra.errors import StorageError
from jaxinfra.track.tensorboard import TensorBoardTracker
from tests.refusals import raises

RECORD = {"config": {"optim": {"peak_lr": 3e-4, "schedule": "cosine"}, "layers": 4, "shape": [1, 2], "tied": True}}
DERIVED = {"parameters": (1000, "count")}


def events(path):
    """Reads an event file: records of length, its checksum, an `Event`, its checksum."""

    def masked(data):
        crc = crc32c(data)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    data, at = path.read_bytes(), 0
    found = []
    while at < len(data):
        header = data[at : at + 8]
        (length,) = struct.unpack("<Q", header)
        assert struct.unpack_from("<I", data, at + 8) == (masked(header),)
        body = data[at + 12 : at + 12 + length]
        assert struct.unpack_from("<I", data, at + 12 + length) == (masked(body),)
        found.append(Event.FromString(body))
        at += length + 16
    return found


def run(run_dir, start_step, stop):
    tracker = TensorBoardTracker(run_dir)
    tracker.start(RECORD, DERIVED, start_step=start_step, total_steps=20)
    for step in range(start_step + 1, stop + 1):
        tracker.log(step, {"loss": step / 2, "eval/loss": 3.0})
    tracker.log_sample(stop, "Once\n\nupon")
    tracker.log_summary({})
    tracker.close()
    tracker.close()


def test_scalars_config_and_hyperparameters_are_read_back(tmp_path):
    run(tmp_path, 0, 3)
    (path,) = (tmp_path / "tensorboard").glob("*tfevents*")
    values = [(event.step, value) for event in events(path) for value in event.summary.value]
    scalars = [(step, value.tag, value.simple_value) for step, value in values if value.HasField("simple_value")]
    assert scalars == [
        (step, tag, value) for step in (1, 2, 3) for tag, value in (("train/loss", step / 2), ("eval/loss", 3.0))
    ]
    texts = {value.tag: value.tensor.string_val[0].decode() for _, value in values if value.tensor.string_val}
    assert '    "layers": 4' in texts["config/text_summary"].replace("      ", "    ")
    assert "| parameters | 1,000 | count |" in texts["derived/text_summary"]
    assert texts["sample/text_summary"] == "    Once\n    \n    upon"
    plugins = [value.metadata.plugin_data.content for _, value in values if value.tag.startswith("_hparams_/session_s")]
    hparams = HParamsPluginData.FromString(plugins[0]).session_start_info.hparams
    assert hparams["optim.peak_lr"].number_value == 3e-4 and hparams["optim.schedule"].string_value == "cosine"
    assert hparams["shape"].string_value == "[1, 2]" and hparams["tied"].bool_value


def test_a_resume_purges_the_steps_that_are_run_again(tmp_path):
    run(tmp_path, 0, 15)
    run(tmp_path, 10, 20)
    paths = sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(paths) == 2
    shown: dict[int, float] = {}
    for event in (event for path in paths for event in events(path)):
        if event.session_log.status == SessionLog.START:  # what TensorBoard does at this mark
            shown = {step: value for step, value in shown.items() if step < event.step}
        for value in event.summary.value:
            if value.tag == "train/loss":
                assert event.step not in shown
                shown[event.step] = value.simple_value
    assert shown == {step: step / 2 for step in range(1, 21)}


def test_an_unwritable_directory_is_found_before_the_first_step(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    with raises(StorageError, f"{tmp_path}/tensorboard track.tensorboard=false"):
        run(tmp_path, 0, 1)
