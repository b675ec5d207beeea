"""What differs between the runs of one config file, by their records."""

from jaxinfra.track.runs import RunOverview, differences

BASE = {
    "name": "story",
    "seed": "0",
    "data.seed": "0",
    "optim.peak_lr": "0.01",
    "train.steps": "400",
    "profile.steps": "3",
    "model.layers.0.mixer.window": "none",
    "model.layers.1.mixer.window": "64",
    "track.console": "auto",
}


def run(source: str = "configs/story.py", **changes: str) -> RunOverview:
    """A run with some fields changed; two underscores stand for a dot."""
    changed = {path.replace("__", "."): value for path, value in changes.items()}
    return RunOverview(path="", state="finished", source=source, config=BASE | changed)


def test_a_value_is_left_out_where_it_is_the_most_common() -> None:
    runs = [run(), run(optim__peak_lr="0.003"), run(train__steps="60", data__seed="1"), run()]
    assert differences(runs) == ["", "peak_lr=0.003", "data.seed=1 train.steps=60", ""]


def test_two_runs_show_both_values() -> None:
    assert differences([run(optim__peak_lr="0.003"), run()]) == ["peak_lr=0.003", "peak_lr=0.01"]


def test_only_runs_of_the_same_config_file_are_compared() -> None:
    runs = [run(optim__peak_lr="0.003"), run("configs/other.py"), run(), run("configs/third.py")]
    assert differences(runs) == ["peak_lr=0.003", "", "peak_lr=0.01", ""]


def test_fields_inside_tuples_have_a_name_that_no_other_field_has() -> None:
    runs = [run(), run(), run(model__layers__0__mixer__window="32", seed="7")]
    assert differences(runs)[2] == "seed=7 layers.0.mixer.window=32"


def test_where_a_run_writes_is_no_difference() -> None:
    assert differences([run(), run(name="other", track__console="off")]) == ["", ""]


def test_a_field_of_one_class_only_is_no_difference() -> None:
    """Such as one of an optimizer: the name of the class differs, and says it."""
    runs = [run(optim__optimizer="adam_w", optim__optimizer__b1="0.9"), run(optim__optimizer="muon")]
    assert differences(runs) == ["optimizer=adam_w", "optimizer=muon"]
