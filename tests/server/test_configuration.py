"""Settings from flags, environment, file and defaults; what is wrong is named by its place."""

import dataclasses
import tomllib

import pytest

from aqt_server import configuration
from aqt_server.configuration import SettingsError
from aqt_server.settings import ModelControl, Settings

HERE = ("--model-repository", "models")


def read(*flags, env=None, file=None, tmp_path=None):
    if file is not None:
        path = tmp_path / "aqt.toml"
        path.write_text(file)
        flags = (*flags, "--config", str(path))
    return configuration.read(flags, env or {}).settings


def test_flags_go_before_the_environment_before_the_file_before_the_defaults(tmp_path):
    file = "[listen]\nport = 1\nmetrics_port = 1\nhost = 'file'\n[batching]\nqueue_rows = 1\n"
    env = {"AQT_PORT": "2", "AQT_METRICS_PORT": "2", "AQT_MODEL_REPOSITORY": "models"}
    found = read("--port", "3", env=env, file=file, tmp_path=tmp_path)
    assert (found.listen.port, found.listen.metrics_port, found.listen.host) == (3, 2, "file")
    assert (found.batching.queue_rows, found.batching.max_batch_rows) == (1, 64)
    assert found.models.model_repository == "models"


def test_the_file_may_be_named_by_the_environment(tmp_path):
    file = tmp_path / "aqt.toml"
    file.write_text("[models]\nmodel_repository = 'models'\n")
    assert read(env={"AQT_CONFIG": str(file)}).models.model_repository == "models"


def test_every_form_of_a_value(tmp_path):
    explicit = ("--model-control", "explicit", "--allow-inexact", "--poll-s", "0.5")
    found = read(*HERE, *explicit, "--load-model", "a", "--load-model", "b").models
    assert found.load_model == ("a", "b")
    assert found.model_control is ModelControl.EXPLICIT
    assert found.poll_s == 0.5
    env = {"AQT_MODEL_CONTROL": "explicit", "AQT_LOAD_MODEL": "a,b", "AQT_ALLOW_INEXACT": "true"}
    env["AQT_POLL_S"] = "0.5"
    assert read(*HERE, env=env).models == found
    file = (
        "[models]\nmodel_control = 'explicit'\nload_model = ['a', 'b']\nallow_inexact = true\n"
        "poll_s = 0.5\n"
    )
    assert read(*HERE, file=file, tmp_path=tmp_path).models == found
    env = {"AQT_ALLOW_INEXACT": "true"}
    assert not read(*HERE, "--no-allow-inexact", env=env).models.allow_inexact


WRONG_FLAGS = {
    ("--port", "many"): "--port is wrong (got 'many'): input should be a valid integer",
    ("--port", "70000"): "--port is wrong (got '70000'): input should be less than or equal to",
    ("--queue-rows", "0"): "--queue-rows is wrong (got '0')",
    ("--prot", "1"): "unrecognized arguments: --prot 1",
    ("--porta=1",): "--porta=1; did you mean --port?",
    ("--port",): "--port: expected one argument",
    ("--model-control", "often"): "'poll', 'explicit' or 'none'",
    ("--status-page",): "--status-page needs --http-port, and it is -1",
    ("--load-model", "m"): "--load-model needs --model-control explicit, and it is poll",
    ("--config", "nowhere.toml"): "--config nowhere.toml cannot be read",
}


@pytest.mark.parametrize("flags", WRONG_FLAGS, ids=" ".join)
def test_a_wrong_flag_is_named(flags):
    with pytest.raises(SettingsError) as raised:
        read(*HERE, *flags)
    assert WRONG_FLAGS[flags] in str(raised.value)


WRONG_FILES = {
    "\n[listen]\nport = 'many'": "line 3: [listen] port is wrong (got 'many')",
    "[listen]\nport = '8001'": "line 2: [listen] port is wrong (got '8001')",
    "[listen]\nport = true": "line 2: [listen] port is wrong (got True)",
    "[listen]\nport = 2001-01-01": "line 2: [listen] port is wrong",
    "[listen]\nport = 8001.5": "line 2: [listen] port is wrong (got 8001.5)",
    "listen.port = -1": "aqt.toml: [listen] port is wrong (got -1)",
    "[models]\nload_model = 'm'": "line 2: [models] load_model is wrong (got 'm')",
    "[listen]\n\nprot = 1": "line 3: [listen] prot is no setting: did you mean port?",
    "[batching]\nport = 1": "line 2: [batching] port is in the wrong table: move it to [listen]",
    "[lisen]\nport = 1": "line 1: lisen is no table of settings: did you mean listen?",
    "port = 1": "line 1: port is no table of settings: it belongs into [listen]",
    "listen = 1": "line 1: listen is no table of settings",
    "[listen\n": "aqt.toml is no TOML: ",
}


@pytest.mark.parametrize("text", WRONG_FILES)
def test_a_wrong_file_is_named_with_line_and_key(text, tmp_path):
    with pytest.raises(SettingsError) as raised:
        read(*HERE, file=text, tmp_path=tmp_path)
    assert WRONG_FILES[text] in str(raised.value)
    assert "aqt.toml" in str(raised.value)


def test_a_wrong_variable_is_named():
    with pytest.raises(SettingsError, match=r"AQT_PORT is wrong \(got 'tcp://10\.0\.0\.1'\)"):
        read(*HERE, env={"AQT_PORT": "tcp://10.0.0.1"})


def test_a_missing_setting_says_every_way_to_give_it():
    with pytest.raises(SettingsError, match=r"--model-repository is missing.*AQT_MODEL_REPOSITORY"):
        read()


def test_a_contradiction_names_both_places(tmp_path):
    with pytest.raises(SettingsError) as raised:
        read(*HERE, env={"AQT_LOAD_MODEL": "m"}, file="[models]\nmodel_control = 'none'",
             tmp_path=tmp_path)  # fmt: skip
    expected = "aqt.toml line 2: [models] model_control explicit, and it is none"
    assert str(raised.value).startswith("AQT_LOAD_MODEL needs ")
    assert expected in str(raised.value)


def test_what_is_printed_is_a_file_that_gives_the_same_settings(tmp_path):
    flags = (*HERE, "--model-control", "explicit", "--load-model", 'a"\\b', "--port", "0")
    found = configuration.read(flags, {"AQT_DRAIN_S": "1.5"})
    text = str(found)
    assert "port = 0  # --port\n" in text
    assert "drain_s = 1.5  # AQT_DRAIN_S\n" in text
    assert "queue_rows = 1024  # default\n" in text
    assert tomllib.loads(text)
    assert read(file=text, tmp_path=tmp_path) == found.settings


def test_variables_that_are_no_settings_are_told():
    environment = {"AQT_PROT": "1", "AQT_PORT": "1", "AQT_CONFIG": "x", "PATH": "y"}
    assert configuration.unknown_variables(environment) == ["AQT_PROT"]


def test_help_says_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as raised:
        configuration.read(["--help"], {})
    assert raised.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    for group in dataclasses.fields(Settings):
        assert f"([{group.name}])" in told
        kind = type(getattr(read(*HERE), group.name))
        assert len(dataclasses.fields(kind)) <= 8
        for field in dataclasses.fields(kind):
            assert f"--{field.name.replace('_', '-')}" in told
    assert "(default: 8001)" in told
    assert "(default: off)" in told
