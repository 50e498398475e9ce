from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lit_unlearn.data.fit_plan import FitPlan
from lit_unlearn.data.images import CaptionItem, KeepForgetImages, load_image, read_folder

Folder = Callable[..., Path]


def picture(number: int, size: tuple[int, int] = (48, 48)) -> Image.Image:
    """Noise, other for each number."""
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, size=(size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Writes a folder of pictures: a caption and the number of each; captions go into ``metadata.jsonl``."""

    def write(name: str, *pictures: tuple[str | None, int]) -> Path:
        path = tmp_path / name
        path.mkdir()
        lines = []
        for place, (caption, number) in enumerate(pictures):
            picture(number).save(path / f"{place}.png")
            if caption is not None:
                lines.append(json.dumps({"file_name": f"{place}.png", "text": caption}))
        (path / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def data(folder: Folder) -> Callable[..., KeepForgetImages]:
    """Two captions to forget, ``a`` with two pictures and ``b`` with one; ``c`` is only to be kept."""
    keep = folder("keep", *[("a", 10 + i) for i in range(3)], *[("b", 20 + i) for i in range(2)], ("c", 30), ("d", 40))
    forget = folder("forget", ("a", 1), ("b", 2), ("a", 3))

    def make(rank: int = 0, world_size: int = 1, epoch: int = 0, done: int = 0, **arguments: Any) -> KeepForgetImages:
        module = arguments.pop("module", {})
        made = KeepForgetImages(str(keep), str(forget), **{"batch_size": 4, "steps": 5, **arguments})
        progress = SimpleNamespace(current=SimpleNamespace(processed=done))
        made.trainer = SimpleNamespace(  # type: ignore[assignment]
            global_rank=rank,
            world_size=world_size,
            current_epoch=epoch,
            state=SimpleNamespace(fn=""),
            lightning_module=SimpleNamespace(fit_plan=FitPlan(**module)),
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
        )
        return made

    return make


def batches(data: KeepForgetImages) -> list[list[tuple[int, int, int]]]:
    return [[tuple(row) for row in batch.tolist()] for batch in data.train_dataloader()]


# --- pictures and captions


def test_captions_come_from_metadata_or_a_text_file_or_are_one_for_all(folder: Folder) -> None:
    path = folder("mixed", ("from metadata", 1), (None, 2))
    (path / "1.txt").write_text("from a file\n", encoding="utf-8")
    (path / "0.txt").write_text("not this one", encoding="utf-8")
    (path / "notes.md").write_text("no picture", encoding="utf-8")
    (path / "more").mkdir()
    picture(3).save(path / "more" / "2.webp", lossless=True)
    (path / "more" / "2.txt").write_text("deeper", encoding="utf-8")
    found = read_folder(str(path), "data.keep")
    assert [(image.path.name, image.caption) for image in found] == [
        ("0.png", "from metadata"),
        ("1.png", "from a file"),
        ("2.webp", "deeper"),
    ]
    assert {image.caption for image in read_folder(str(path), "data.keep", "one")} == {"one"}


def test_a_picture_is_resized_and_its_middle_taken(tmp_path: Path) -> None:
    wide = Image.new("RGB", (64, 32), (255, 0, 0))
    wide.paste((0, 255, 0), (16, 0, 48, 32))
    wide.save(tmp_path / "wide.png")
    loaded = load_image(tmp_path / "wide.png", 16)
    assert loaded.shape == (3, 16, 16)
    assert torch.equal(loaded, torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1).expand(3, 16, 16))
    original = picture(0)
    original.save(tmp_path / "same.png")
    assert torch.equal(load_image(tmp_path / "same.png", 48) * 255, torch.tensor(np.array(original)).permute(2, 0, 1))


def test_pictures_of_other_modes_and_sizes_are_read(tmp_path: Path) -> None:
    for mode, name in (("L", "grey.png"), ("RGBA", "clear.png"), ("P", "palette.png"), ("RGB", "photo.jpg")):
        picture(1, (40, 24)).convert(mode).save(tmp_path / name)
    found = read_folder(str(tmp_path), "data.keep", "a caption")
    assert len({image.digest for image in found}) == 4
    assert {load_image(image.path, 8).shape for image in found} == {(3, 8, 8)}


# --- what is refused, with the file that is to blame


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: (path / "0.png").write_bytes(b"no picture"),
            r"0\.png is no readable picture \(it is in no format",
        ),
        (
            lambda path: (path / "0.png").write_bytes((path / "0.png").read_bytes()[:200]),
            r"0\.png is no readable picture \(.*truncated",
        ),
        (lambda path: Image.new("RGB", (4, 40)).save(path / "0.png"), r"0\.png has 4 x 40 pixels"),
        (
            lambda path: (path / "metadata.jsonl").unlink(),
            r"0\.png has no caption: name it in .*metadata\.jsonl, write 0",
        ),
        (
            lambda path: (path / "metadata.jsonl").write_text('{"text": 1}', encoding="utf-8"),
            r"metadata\.jsonl, line 1, is not of the form",
        ),
        (
            lambda path: (path / "metadata.jsonl").write_text("\n{", encoding="utf-8"),
            r"metadata\.jsonl, line 2, is not of the form",
        ),
        (
            lambda path: (path / "metadata.jsonl").write_text('{"file_name": "9.png", "text": "a"}', encoding="utf-8"),
            r"line 1, names '9\.png', which is not in the folder",
        ),
    ],
)
def test_a_file_that_is_wrong_is_named(folder: Folder, damage: Callable[[Path], Any], message: str) -> None:
    path = folder("wrong", ("a", 1), ("a", 2))
    read_folder(str(path), "data.forget")
    damage(path)
    with pytest.raises(ValueError, match=message):
        read_folder(str(path), "data.forget")


def test_a_folder_that_is_missing_or_empty_is_named(folder: Folder, tmp_path: Path) -> None:
    keep = folder("keep", ("a", 1))
    with pytest.raises(ValueError, match=r"data\.forget='.*none' is no folder"):
        KeepForgetImages(str(keep), str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"data\.keep='.*empty' holds no picture"):
        KeepForgetImages(str(folder("empty")), str(keep))


@pytest.mark.parametrize("where", ["keep", "held_out"])
def test_a_picture_cannot_be_kept_and_forgotten(folder: Folder, where: str) -> None:
    folders = {
        "keep": folder("keep", ("a", 1)),
        "forget": folder("forget", ("a", 2)),
        "held_out": folder("h", ("a", 3)),
    }
    KeepForgetImages(**{name: str(path) for name, path in folders.items()})
    picture(2).save(folders[where] / "copy.webp", lossless=True)  # another file, the same pixels
    (folders[where] / "copy.txt").write_text("another caption", encoding="utf-8")
    with pytest.raises(ValueError, match=r"copy\.webp shows the same picture as .*forget/0\.png"):
        KeepForgetImages(**{name: str(path) for name, path in folders.items()})


def test_pairing_by_caption_needs_a_partner(folder: Folder) -> None:
    keep, forget = folder("keep", ("a", 1)), folder("forget", ("a", 2), ("b", 3))
    with pytest.raises(ValueError, match=r"no picture in .*keep has the caption 'b'"):
        KeepForgetImages(str(keep), str(forget))
    KeepForgetImages(str(keep), str(forget), pairing="any")
    KeepForgetImages(str(keep), str(forget), caption="one for all")


@pytest.mark.parametrize("field", ["batch_size", "steps", "images_per_prompt", "eval_batch_size"])
def test_counts_must_be_positive(data: Callable[..., KeepForgetImages], field: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.{field}=0 must be at least 1"):
        data(**{field: 0})
    with pytest.raises(ValueError, match=r"data\.keep_captions=-1 must not be negative"):
        data(keep_captions=-1)


# --- pairs


def test_partners_have_the_same_caption(data: Callable[..., KeepForgetImages]) -> None:
    images = data(steps=12)
    pairs = [pair for batch in batches(images) for pair in batch]
    assert all(images.keep[x].caption == images.forget[a].caption for _, x, a in pairs)
    # 48 pairs: each of the 3 to forget comes once before any comes again, and so do those that are kept.
    assert Counter(a for _, _, a in pairs) == {0: 16, 1: 16, 2: 16}
    kept = Counter(x for _, x, _ in pairs)
    assert set(kept) == {0, 1, 2, 3, 4}
    assert max(kept[i] for i in range(3)) - min(kept[i] for i in range(3)) <= 1
    assert [place for place, _, _ in pairs] == [0, 1, 2, 3] * 12


def test_partners_of_any_caption(data: Callable[..., KeepForgetImages]) -> None:
    pairs = [pair for batch in batches(data(steps=7, pairing="any")) for pair in batch]
    assert Counter(x for _, x, _ in pairs) == dict.fromkeys(range(7), 4)


def test_the_method_may_draw_from_all_pictures(data: Callable[..., KeepForgetImages]) -> None:
    images = data(steps=30, module={"draws_from_all": True})
    pairs = [pair for batch in batches(images) for pair in batch]
    everything = [*images.keep, *images.forget]
    assert all(everything[x].caption == images.forget[a].caption for _, x, a in pairs)
    assert {x for _, x, _ in pairs} == {0, 1, 2, 3, 4, 7, 8, 9}
    assert images.counts(0) == images.counts(2) == (5, 2)
    assert images.counts(1) == (3, 1)
    assert {data(pairing="any").counts(a) for a in range(3)} == {(10, 3)}


def test_the_order_is_by_the_methods_seed_and_the_epoch(data: Callable[..., KeepForgetImages]) -> None:
    first = batches(data())
    assert batches(data()) == first
    assert batches(data(seed=1)) == first  # that is of the pictures of a test
    assert batches(data(module={"seed": 1})) != first
    assert batches(data(epoch=1)) != first


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_steps_of_several_ranks_are_those_of_one(data: Callable[..., KeepForgetImages], world_size: int) -> None:
    alone = batches(data())
    shares = [batches(data(rank, world_size)) for rank in range(world_size)]
    for step, batch in enumerate(alone):
        assert sorted(pair for share in shares for pair in share[step]) == sorted(batch)
    with pytest.raises(ValueError, match=r"data\.batch_size=4 is less than the 5 processes"):
        data(0, 5).train_dataloader()


def test_a_resumed_epoch_goes_on_behind_the_steps_that_it_had(data: Callable[..., KeepForgetImages]) -> None:
    whole = batches(data(epoch=2))
    for done, rest in ((0, whole), (3, whole[3:]), (5, whole)):
        resumed = data(epoch=2, done=done)
        assert batches(resumed) == rest
        assert len(resumed.train_dataloader()) == 5


# --- pictures of a test


def items(data: KeepForgetImages, split: str = "test") -> list[CaptionItem]:
    return [item for batch in getattr(data, f"{split}_dataloader")() for item in batch]


def test_a_test_draws_captions_to_forget_and_others_with_seeds_of_their_own(
    data: Callable[..., KeepForgetImages],
) -> None:
    found = items(data(images_per_prompt=3))
    assert Counter((item.prompt, item.kind) for item in found) == {
        ("a", "forget"): 3,
        ("b", "forget"): 3,
        ("c", "keep"): 3,
        ("d", "keep"): 3,
    }
    assert len({item.seed for item in found}) == 12
    assert [item.number for item in found] == list(range(12))
    fewer = {(item.prompt, item.image_index): item.seed for item in items(data(images_per_prompt=1))}
    assert fewer.items() <= {(item.prompt, item.image_index): item.seed for item in found}.items()
    assert {item.prompt for item in items(data(keep_captions=1))} == {"a", "b", "c"}
    assert [item.prompt for item in items(data(), "val")] == ["a", "b"]
    assert items(data(), "predict") == items(data())


def test_ranks_share_the_pictures_of_a_test(data: Callable[..., KeepForgetImages]) -> None:
    shares = [items(data(rank, 3, images_per_prompt=2)) for rank in range(3)]
    assert sorted(item.number for share in shares for item in share) == list(range(8))


def test_a_fit_does_not_validate(data: Callable[..., KeepForgetImages]) -> None:
    fitting = data()
    fitting.trainer.state.fn = "fit"  # type: ignore[union-attr]
    assert fitting.val_dataloader() == []


def test_the_identity_is_that_of_pictures_and_captions(folder: Folder) -> None:
    keep, forget = folder("keep", ("a", 1), ("b", 2)), folder("forget", ("a", 3))
    renamed, other = folder("renamed", ("b", 2), ("a", 1)), folder("other", ("a", 1), ("a", 2))
    of = {
        path.name: KeepForgetImages(str(path), str(forget), pairing="any").identity for path in (keep, renamed, other)
    }
    assert of["keep"] == of["renamed"]
    assert of["keep"]["forget"] == of["other"]["forget"]
    assert of["keep"]["keep"] != of["other"]["keep"]
