"""What is set, and where: flags before environment before files before defaults, and what is said of mistakes."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any

import pytest

from bigmachine import driver, settings
from bigmachine.cli import exits, main
from bigmachine.cli.arguments import make_parser
from bigmachine.cli.config import SECTIONS
from bigmachine.driver import FLAGS, take_flags
from bigmachine.errors import UsageError
from bigmachine.inside import settings as inside
from bigmachine.launch import find_system
from bigmachine.settings import DEFAULT, Section, fields, load, setting, toml
from bigmachine.systems import local
from bigmachine.systems.ec2 import launching
from bigmachine.systems.ec2 import settings as ec2
from bigmachine.systems.ssh import SshLauncher
from bigmachine.systems.ssh import settings as ssh

SYSTEMS: dict[str, type[Section]] = {"local": local.Settings, "ssh": ssh.Settings, "ec2": ec2.Settings}
KINDS = {"session": inside.Settings, **SYSTEMS}


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user's own file is; the working directory and the environment have nothing of his."""
    folder = tmp_path / "user"
    folder.mkdir()
    monkeypatch.setattr(settings, "user_file", lambda: folder / settings.FILE)
    monkeypatch.setattr(driver, "_parsed", {})
    for name in [name for name in os.environ if name.startswith(tuple(f"BIGMACHINE_{each.upper()}_" for each in KINDS))]:
        monkeypatch.delenv(name)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def loaded(given: Mapping[str, object] | None = None, **environ: str) -> ec2.Settings:
    """Of `ec2`, with ``TYPE="t"`` for ``BIGMACHINE_EC2_TYPE``."""
    return load(ec2.Settings, "ec2", given or {}, environ={f"BIGMACHINE_EC2_{key}": text for key, text in environ.items()})


def refused(given: Mapping[str, object] | None = None, **environ: str) -> str:
    with pytest.raises(UsageError) as caught:
        loaded(given, **environ)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(text: str, file: str | Path = settings.FILE) -> Path:
    path = Path(file).absolute()
    path.write_text(text)
    return path


# -- Where values come from ----------------------------------------------------------------------------------------------


def test_each_source_goes_before_the_next(user: Path) -> None:
    def now(given: Mapping[str, object] | None = None, **environ: str) -> tuple[int, str]:
        found = loaded(given, **environ)
        return found.diskspace, found.origins["diskspace"]

    assert now() == (ec2.DISK, DEFAULT)
    theirs = write("[ec2]\ndiskspace = 11", user / settings.FILE)
    assert now() == (11, f"[ec2] in {theirs}")
    project = write("[tool.bigmachine.ec2]\ndiskspace = 12", settings.PROJECT)
    assert now() == (12, f"[tool.bigmachine.ec2] in {project}")
    here = write("[ec2]\ndiskspace = 13")
    assert now() == (13, f"[ec2] in {here}")
    assert now(DISKSPACE="14") == (14, "environment BIGMACHINE_EC2_DISKSPACE")
    assert now({"ec2diskspace": 15}, DISKSPACE="14") == (15, "flag -bigm.ec2diskspace")
    assert now({"ec2diskspace": None}, DISKSPACE="") == (13, f"[ec2] in {here}")


def test_each_field_for_itself_and_lists_as_a_whole(user: Path) -> None:
    theirs = write("[ec2]\nregion = 'eu-north-1'\nsubnets = ['subnet-1', 'subnet-2']", user / settings.FILE)
    write("[ec2]\nsubnets = ['subnet-3']\n[ssh]\nhosts = ['ada']")
    found = loaded({"ec2keypair": "me"})
    assert (found.region, found.subnets, found.keypair) == ("eu-north-1", ("subnet-3",), "me")
    assert found.origin("region") == f"[ec2] in {theirs}"
    assert set(found.origins) == {each.field for each in fields(ec2.Settings)}


def test_the_process_has_an_environment_and_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BIGMACHINE_EC2_REGION", "eu-west-1")
    write("[ec2]\nprofile = 'theirs'")
    found = load(ec2.Settings, "ec2", {})
    assert (found.region, found.profile) == ("eu-west-1", "theirs")
    elsewhere = load(ec2.Settings, "ec2", {}, environ={}, folder=tmp_path)
    assert (elsewhere.region, elsewhere.profile) == ("", "")


def test_a_working_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert loaded().types == (ec2.TYPE,)


def test_the_users_file_is_where_such_files_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    file = settings.user_file()
    assert file.parts[-2:] == ("bigmachine", "bigmachine.toml")
    if sys.platform == "linux":
        assert file == tmp_path / "bigmachine" / "bigmachine.toml"


def test_what_is_loaded_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        loaded().port = 1  # type: ignore[misc]
    assert loaded() == loaded({"ec2diskspace": ec2.DISK})  # Wherever it comes from.
    assert hash(loaded({"ec2tags": "a=b"})) == hash(loaded())


# -- Kinds of values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("TYPE", "m7i.large, c7g.xlarge,", "types", ("m7i.large", "c7g.xlarge")),
        ("DISKSPACE", " 20 ", "diskspace", 20),
        ("ONDEMAND", "true", "ondemand", True),
        ("ONDEMAND", "1", "ondemand", True),
        ("PUBLICIP", "False", "publicip", False),
        ("PUBLICIP", "off", "publicip", False),
        ("PUBLICIP", "yes", "publicip", True),
        ("MAXPRICE", "0.05", "maxprice", "0.05"),
        ("TAGS", "team=physics, cost = 12,none=,x=a=b", "tags", {"team": "physics", "cost": "12", "none": "", "x": "a=b"}),
        ("UNITS", "a.service,b.timer", "units", ("a.service", "b.timer")),
        ("PORT", "8443", "port", 8443),
    ],
)
def test_texts(variable: str, text: str, field: str, value: object) -> None:
    found = loaded(**{variable: text})
    assert getattr(found, field) == value
    assert found.origin(field) == f"environment BIGMACHINE_EC2_{variable}"
    (each,) = (each for each in fields(ec2.Settings, "ec2") if each.field == field)
    assert getattr(loaded({each.flag: text}), field) == value


FILE_OF_ALL = """
[ec2]
type = ["m7i.large", "m6i.large"]
ondemand = true
spotonly = false
maxprice = 0.10
region = "eu-central-1"
profile = "research"
ami = "ami-1"
user = "admin"
diskspace = 30
dataspace = 500
subnets = ["subnet-1"]
securitygroups = ["sg-1", "sg-2"]
publicip = false
instanceprofile = "reader"
keypair = "me"
tags = {team = "physics", "a b" = "\\"quoted\\" \\u007f"}
cloudconfig = ["/etc/extra.yaml"]
units = ["/etc/my.service"]
port = 8443
maxprocs = 2
"""


def test_files() -> None:
    file = write(FILE_OF_ALL)
    found = loaded()
    assert found.types == ("m7i.large", "m6i.large")
    assert (found.ondemand, found.spotonly, found.publicip) == (True, False, False)
    assert (found.maxprice, found.diskspace, found.dataspace) == ("0.10", 30, 500)  # As it was written, 0.10.
    assert found.tags == {"team": "physics", "a b": '"quoted" \x7f'}
    assert set(found.origins.values()) == {f"[ec2] in {file}"}


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("type = 'm7i.large'", "types", ("m7i.large",)),
        ("type = 'm7i.large,m6i.large'", "types", ("m7i.large", "m6i.large")),
        ("maxprice = '0.05'", "maxprice", "0.05"),
        ("maxprice = 1", "maxprice", "1"),
        ("subnets = []", "subnets", ()),
        ("[ec2.tags]\nteam = 'physics'", "tags", {"team": "physics"}),
    ],
)
def test_other_ways_to_write_it_in_a_file(line: str, field: str, value: object) -> None:
    write(f"[ec2]\n{line}")
    assert getattr(loaded(), field) == value


@pytest.mark.parametrize(
    ("option", "value", "field", "expected"),
    [
        ("ec2type", ["m7i.large", "m6i.large"], "types", ("m7i.large", "m6i.large")),
        ("ec2publicip", False, "publicip", False),
        ("ec2maxprice", 0.05, "maxprice", "0.05"),
        ("ec2tags", {"team": "physics"}, "tags", {"team": "physics"}),
        ("ec2units", (Path("my.service"), "b"), "units", ("my.service", "b")),
        ("ec2ami", "", "ami", ""),
    ],
)
def test_options_are_values_of_python(option: str, value: object, field: str, expected: object) -> None:
    write("[ec2]\nami = 'ami-1'")
    found = loaded({option: value})
    assert getattr(found, field) == expected
    assert found.origin(field) == f"flag -bigm.{option}"


def test_paths_begin_where_they_were_written(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    write("[ec2]\ncloudconfig = ['extra.yaml', '~/mine.yaml', '/etc/x']\n[ssh]\nconfig = 'ssh'", user / settings.FILE)
    assert loaded().cloudconfig == (str(user / "extra.yaml"), "/home/ada/mine.yaml", "/etc/x")
    assert load(ssh.Settings, "ssh", {}, environ={}).config == str(user / "ssh")
    assert loaded({"ec2cloudconfig": "extra.yaml,~/mine.yaml"}).cloudconfig == ("extra.yaml", "/home/ada/mine.yaml")
    assert load(ssh.Settings, "ssh", {"sshconfig": Path("~/x")}, environ={}).config == "/home/ada/x"
    assert load(ssh.Settings, "ssh", {"hosts": "@a,b"}, environ={}).hosts == ("@a,b",)


# -- Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("types = ['a.b']", "unknown key 'types'; did you mean 'type'?"),
        ("zzz = 1", "unknown key 'zzz'; there are ami, cloudconfig, dataspace,"),
        ("type = 3", f'type is a list of texts, such as type = ["{ec2.TYPE}"], not 3'),
        ("type = ['m7i.large', 3]", 'type is a list of texts, such as type = ["m7i.large"], not ["m7i.large", 3]'),
        ("subnets = 'subnet-1'", "subnets is a list of texts, such as subnets = ["),
        ("diskspace = '50'", f'diskspace is a whole number, such as diskspace = {ec2.DISK}, not "50"'),
        ("diskspace = 50.5", "diskspace is a whole number, such as diskspace = 50, not 50.5"),
        ("diskspace = true", "diskspace is a whole number, such as diskspace = 50, not true"),
        ("ondemand = 1", "ondemand is true or false, such as ondemand = true, not 1"),
        ("publicip = 'false'", 'publicip is true or false, such as publicip = false, not "false"'),
        ("region = 1", 'region is a text, such as region = "eu-central-1", not 1'),
        ("maxprice = true", 'maxprice is a text, such as maxprice = "0.05", not true'),
        ("tags = 'team=physics'", 'tags is a table of texts, such as tags = {team = "physics"}, not "team=physics"'),
        ("tags = {cost = 12}", "tags is a table of texts, such as"),
        ("keypair = 2026-11-22", 'keypair is a text, such as keypair = "me", not datetime.date(2026, 11, 22)'),
        ("cloudconfig = 'a.yaml'", "cloudconfig is a list of texts"),
    ],
)
@pytest.mark.parametrize("name", [settings.FILE, settings.PROJECT])
def test_wrong_values_in_files(line: str, message: str, name: str) -> None:
    section = "[ec2]" if name == settings.FILE else "[tool.bigmachine.ec2]"
    file = write(f"{section}\n{line}", name)
    # A flag does not hide it.
    assert refused({"ec2type": "m7i.large", "ec2diskspace": 20}).startswith(f"{section} in {file}: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[ec2", "cannot be read, it is no TOML: "),
        ("[ec2]\nport = 1\nport = 2", "cannot be read, it is no TOML: "),
        ("ec2 = 3", "ec2 is a section, [ec2] with keys of its own, not 3"),
        ("[[ec2]]\nport = 1", "ec2 is a section, [ec2] with keys of its own, not [{port = 1}]"),
        ("type = 'm7i.large'\n[ec2]\n", "'type' stands in no section; put it below that of its system, such as [ec2]"),
    ],
)
def test_files_that_are_wrong_as_a_whole(text: str, message: str) -> None:
    file = write(text)
    assert refused().startswith(str(file))
    assert message in refused()


def test_projects_files_that_are_wrong_as_a_whole() -> None:
    file = write("[tool]\nbigmachine = 3", settings.PROJECT)
    assert refused() == (
        f"{file}: tool.bigmachine is a section, [tool.bigmachine.ec2] with keys of its own, not 3"
    )
    write("name = 3\n[project]\nname = 'x'\n[tool.other]\nec2 = 3", settings.PROJECT)  # Nothing of ours.
    assert loaded() == loaded()
    write("[tool.bigmachine]\ntype = 'x'", settings.PROJECT)
    assert "'type' stands in no section; put it below that of its system, such as [tool.bigmachine.ec2]" in refused()


def test_files_that_cannot_be_read(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(settings.FILE).mkdir()
    assert refused() == f"{Path(settings.FILE).absolute()} cannot be read: Is a directory"
    Path(settings.FILE).rmdir()
    Path(settings.FILE).write_bytes(b"# \xff")
    assert refused().startswith(f"{Path(settings.FILE).absolute()} cannot be read: not UTF-8: ")
    Path(settings.FILE).unlink()

    def closed(file: Path, encoding: str) -> str:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(Path, "read_text", closed)
    assert refused().endswith(f"{settings.FILE} cannot be read: Permission denied")
    # In a directory that we may not even look into, nothing is meant for us.
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert loaded().types == (ec2.TYPE,)


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("TYPES", "x", "environment: unknown variable 'BIGMACHINE_EC2_TYPES'; did you mean 'BIGMACHINE_EC2_TYPE'?"),
        ("DISKSPACE", "50 GB", "environment BIGMACHINE_EC2_DISKSPACE: a whole number, such as 50, not '50 GB'"),
        ("DISKSPACE", "9" * 30, "environment BIGMACHINE_EC2_DISKSPACE: a whole number"),
        ("ONDEMAND", "maybe", "environment BIGMACHINE_EC2_ONDEMAND: true or false, such as true, not 'maybe'"),
        ("PUBLICIP", "0.0.0.0", "environment BIGMACHINE_EC2_PUBLICIP: true or false, such as false, not '0.0.0.0'"),
        ("TAGS", "team", "environment BIGMACHINE_EC2_TAGS: a table of texts, such as team=physics, not 'team'"),
        ("TAGS", "=x", "environment BIGMACHINE_EC2_TAGS: a table of texts"),
        ("TYPE", "large", "environment BIGMACHINE_EC2_TYPE: not an instance type: 'large'; it is such as m7i.large"),
        ("TYPE", ",", "environment BIGMACHINE_EC2_TYPE: type names no instance type"),
        ("DISKSPACE", "4", "environment BIGMACHINE_EC2_DISKSPACE: diskspace is 8 to 16384 GiB, not 4"),
        ("DATASPACE", "-1", "environment BIGMACHINE_EC2_DATASPACE: dataspace is 0 to"),
        ("PORT", "0", "environment BIGMACHINE_EC2_PORT: not a port that a security group can open: 0"),
        ("MAXPROCS", "-1", "environment BIGMACHINE_EC2_MAXPROCS: maxprocs must be at least 1, or 0"),
        ("MAXPRICE", "cheap", "environment BIGMACHINE_EC2_MAXPRICE: maxprice is USD an hour, such as 0.05, not 'cheap'"),
        ("MAXPRICE", "0", "environment BIGMACHINE_EC2_MAXPRICE: maxprice is USD an hour"),
        ("MAXPRICE", "nan", "environment BIGMACHINE_EC2_MAXPRICE: maxprice is USD an hour"),
        ("AMI", "debian", "environment BIGMACHINE_EC2_AMI: ami: not an id: 'debian'; it is such as ami-0"),
        ("SUBNETS", "subnet-1,vpc-1", "environment BIGMACHINE_EC2_SUBNETS: subnets: not an id: 'vpc-1'"),
        ("SECURITYGROUPS", "mine", "environment BIGMACHINE_EC2_SECURITYGROUPS: securitygroups: not an id: 'mine'"),
        ("USER", "admin", "environment BIGMACHINE_EC2_USER: user is the login name of the image that ami names"),
        ("TAGS", "Name=x", "environment BIGMACHINE_EC2_TAGS: tags: 'Name' is not for you to give"),
        ("TAGS", "AWS:x=y", "environment BIGMACHINE_EC2_TAGS: tags: 'AWS:x' is not for you to give"),
        ("TAGS", f"a={'x' * 257}", "environment BIGMACHINE_EC2_TAGS: tags: names have 1 to 128 characters"),
        ("TAGS", ",".join(f"k{i}=v" for i in range(41)), "environment BIGMACHINE_EC2_TAGS: tags: 41, more than 40"),
    ],
)
def test_wrong_values_in_the_environment(variable: str, text: str, message: str) -> None:
    assert refused(**{variable: text}).startswith(message)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ec2types": "x"}, "no such option: 'ec2types'; did you mean 'ec2type'?"),
        ({"types": ("x",)}, "no such option: 'types'; did you mean "),
        ({"ec2diskspace": "big"}, "flag -bigm.ec2diskspace: a whole number, such as 50, not 'big'"),
        ({"ec2diskspace": 50.0}, "flag -bigm.ec2diskspace: a whole number, such as diskspace = 50, not 50.0"),
        ({"ec2type": object}, "flag -bigm.ec2type: a list of texts, such as type = ["),
        ({"ec2publicip": "nowhere"}, "flag -bigm.ec2publicip: true or false, such as false, not 'nowhere'"),
        ({"ec2publicip": 0}, "flag -bigm.ec2publicip: true or false, such as publicip = false, not 0"),
        ({"port": 70000}, "flag -bigm.port: not a port that a security group can open: 70000"),
    ],
)
def test_wrong_options(given: Mapping[str, object], message: str) -> None:
    assert refused(given).startswith(message)


def test_the_most_data_is_what_the_volumes_hold() -> None:
    assert ec2.MAX_DATA == launching.STRIPES * ec2.MAX_DISK


def test_settings_that_contradict_each_other_are_named_with_their_origins() -> None:
    file = write("[ec2]\nspotonly = true")
    assert refused({"ec2ondemand": True}) == (
        f"[ec2] in {file}: spotonly contradicts ondemand (flag -bigm.ec2ondemand): leave out one"
    )
    assert loaded({"ec2ondemand": True, "ec2spotonly": False}).ondemand


# -- Flags ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_setting_has_a_flag(system: str) -> None:
    for each in fields(KINDS[system], system):
        kind, text = FLAGS[each.flag]
        # A flag that is there says true; where that is the default, somebody has to say false.
        expected = {bool: str if each.default is True else bool, int: int}.get(type(each.default), str)
        assert kind is expected, each.flag
        assert f"{system}:" in text or f"{system}, " in text or f", {system}:" in text, each.flag
        if each.default and each.flag.startswith(system):
            shown = {True: "true"}.get(each.default) or ",".join(map(str, _items(each.default)))
            assert text.endswith(f"({shown})"), each.flag


def _items(value: Any) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else (value,)


def test_each_flag_has_a_setting() -> None:
    flags = {each.flag for system, kind in KINDS.items() for each in fields(kind, system)}
    assert flags == FLAGS.keys() - {"system"}


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_setting_is_an_option_of_the_launcher(system: str) -> None:
    parameters = inspect.signature(find_system(system)).parameters
    assert dict.fromkeys(parameters) == {name: each.default for name, each in parameters.items()}
    assert set(parameters) == {each.flag for each in fields(KINDS[system], system)}


def test_the_readme_has_all_of_them() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
    table = [line.split("|") for line in text.splitlines() if line.startswith("| `-bigm.")]
    told = {
        (flag, system, key)
        for _, flags, *keys, _, _ in table
        for system, names in zip(["session"] if len(keys) == 1 else SYSTEMS, keys, strict=True)
        for flag, key in zip(re.findall(r"`-bigm\.(\w+)`", flags), re.findall(r"`(\w+)`", names), strict=False)
    }
    assert told == {(each.flag, system, each.key) for system in KINDS for each in fields(KINDS[system], system)}


def test_config_shows_those_systems() -> None:
    assert {name: kind.__module__ for name, kind in KINDS.items()} == SECTIONS


def parsed(words: list[str]) -> dict[str, Any]:
    """What a program's own parser makes of flags."""
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    driver.add_flags(parser)
    assert parser.parse_args([*words, "rest"]).words == ["rest"]
    return driver._parsed


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["-bigm.ec2publicip=false"], "publicip", False),
        (["--bigm.ec2publicip=false"], "publicip", False),
        (["-bigm.ec2publicip", "false"], "publicip", False),
        (["--bigm.ec2publicip", "true"], "publicip", True),
        (["-bigm.ec2ondemand"], "ondemand", True),
        (["--bigm.ec2ondemand=true"], "ondemand", True),
        (["-bigm.ec2ondemand", "-bigm.ec2ondemand=false"], "ondemand", False),
        (["-bigm.ec2type", "m7i.large,m6i.large"], "types", ("m7i.large", "m6i.large")),
        (["-bigm.ec2diskspace=100"], "diskspace", 100),
        (["--bigm.ec2tags=a=b,c=d"], "tags", {"a": "b", "c": "d"}),
        (["-bigm.port=8443"], "port", 8443),
    ],
)
def test_spellings_of_flags(words: list[str], field: str, value: object) -> None:
    taken, rest = take_flags([*words, "rest"])
    assert rest == ["rest"]
    assert getattr(loaded(taken), field) == value
    assert parsed(words) == taken
    assert make_parser().parse_args(["doctor", "ec2", *words]).flags == taken


def test_a_flag_without_a_value_is_a_mistake_where_one_is_needed() -> None:
    with pytest.raises(UsageError, match=r"flag -bigm.ec2publicip needs a value: ec2: false for machines without"):
        take_flags(["-bigm.ec2publicip"])
    with pytest.raises(UsageError, match=r"flag -bigm.ec2ondemand takes no value, or =true or =false: ec2: "):
        take_flags(["-bigm.ec2ondemand=perhaps"])
    taken, _ = take_flags(["-bigm.ec2publicip", "-bigm.ec2ondemand"])
    assert refused(taken) == "flag -bigm.ec2publicip: true or false, such as false, not '-bigm.ec2ondemand'"


# -- Other systems -------------------------------------------------------------------------------------------------------


def test_a_launcher_takes_what_is_set_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    write("[ssh]\nhosts = ['ada']\nplatforms = ['linux/arm64']\nmaxprocs = 3\n[local]\nmaxprocs = 2")
    monkeypatch.setenv("BIGMACHINE_SSH_PLATFORMS", "linux/amd64,linux/arm64")
    launcher = SshLauncher(maxprocs=5)
    assert launcher.ships == ("linux/amd64", "linux/arm64")
    assert (launcher._maxprocs, [each.target.name for each in launcher._hosts]) == (5, ["ada"])
    launcher.close()
    assert local.LocalLauncher()._maxprocs == 2
    monkeypatch.setenv("BIGMACHINE_LOCAL_MAXPROCS", "0")
    with pytest.raises(UsageError, match="environment BIGMACHINE_LOCAL_MAXPROCS: maxprocs must be at least 1: 0"):
        local.LocalLauncher()


@dataclass(frozen=True, kw_only=True)
class Moon(Section):
    """The settings of a system that somebody else has written."""

    crater: str = setting("Tycho")
    landers: int = setting(1, flag="landers")


def test_a_section_of_ones_own() -> None:
    write("[moon]\ncrater = 'Kepler'")
    found = load(Moon, "moon", {"landers": 2}, environ={"BIGMACHINE_MOON_LANDERS": "3"})
    assert (found.crater, found.landers) == ("Kepler", 2)
    assert [each.flag for each in fields(Moon, "moon")] == ["mooncrater", "landers"]
    assert str(Moon()) == 'crater = "Tycho"  # default\nlanders = 1       # default'


# -- What is shown -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [True, 3, "", 'a "b" \\ \n\t\x7f\x00 é 🌍', ["a"], [], {"a": "b", "c d": "é", "": "x"}, [{"a": 1}]]
)
def test_what_is_shown_is_toml(value: object) -> None:
    assert tomllib.loads(f"x = {toml(value)}") == {"x": value}


def test_settings_print_themselves() -> None:
    write(FILE_OF_ALL)
    shown = str(loaded({"port": 444}))
    assert re.search(r"^port = 444 +# flag -bigm\.port$", shown, re.MULTILINE)
    expected = tomllib.loads(FILE_OF_ALL)["ec2"] | {"port": 444, "maxprice": "0.10"}
    assert tomllib.loads(shown) == expected
    # It may stand in a file: what comes out is the same.
    write(f"[ec2]\n{shown}")
    assert loaded() == loaded({"port": 444})


def config(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["config", *words]) == exits.DONE
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_config_shows_every_value_with_its_origin(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write("[ec2]\nregion = 'eu-west-1'\n[ssh]\nhosts = ['ada', 'grace']")
    monkeypatch.setenv("BIGMACHINE_EC2_TYPE", "c7i.large")
    out = config(capsys, "-bigm.ec2publicip=false", "--bigm.maxprocs", "3")
    lines = {re.sub(r"\s+", " ", line) for line in out.splitlines()}
    assert {"[local]", "[ssh]", "[ec2]", "maxprocs = 3 # flag -bigm.maxprocs", "image = false # default"} < lines
    assert f'hosts = ["ada", "grace"] # [ssh] in {file}' in lines
    assert 'type = ["c7i.large"] # environment BIGMACHINE_EC2_TYPE' in lines
    assert f'region = "eu-west-1" # [ec2] in {file}' in lines
    assert "publicip = false # flag -bigm.ec2publicip" in lines
    assert set(tomllib.loads(out)) == {"session", "local", "ssh", "ec2"}
    assert tomllib.loads(config(capsys, "--system", "ssh")).keys() == {"ssh"}
    assert tomllib.loads(config(capsys, "-bigm.system=ec2")).keys() == {"ec2"}


def test_config_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(config(capsys, "--system", "ec2", "--json", "-bigm.ec2tags=a=b"))
    assert set(told) == {"ec2"}
    assert list(told["ec2"]) == [each.key for each in fields(ec2.Settings)]
    assert told["ec2"]["tags"] == {
        "value": {"a": "b"},
        "origin": "flag -bigm.ec2tags",
        "flag": "-bigm.ec2tags",
        "variable": "BIGMACHINE_EC2_TAGS",
        "about": FLAGS["ec2tags"][1],
    }
    assert told["ec2"]["type"]["value"] == [ec2.TYPE]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--system", "moon"], "no such system, or without settings: 'moon'; there are session, local, ssh, ec2"),
        (["-bigm.system=test"], "no such system, or without settings: 'test'"),
        (["-bigm.moon=1"], "unrecognized arguments: -bigm.moon=1"),
        (["-bigm.ec2diskspace=big"], "invalid int value: 'big'"),
        (["-bigm.ec2type=large"], "flag -bigm.ec2type: not an instance type: 'large'; it is such as m7i.large"),
    ],
)
def test_config_that_is_wrong(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["config", *words]) == exits.WRONG
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("bigmachine: ")
    assert message in err
