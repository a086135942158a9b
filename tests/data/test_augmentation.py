import pytest
import torch
from scipy.stats import chisquare
from torchvision.transforms import functional, v2

from lit_prune.data.augmentation import Normalisation, PadCropFlip, ResizedCropFlip, draw_crops
from lit_prune.data.sampling import seeded_generator
from lit_prune.data.sources import FileImages, MemoryImages


def pixels(count=16, size=12):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_offsets_and_flips_are_uniform_and_independent():
    draws = draw_crops(90_000, 4, True, 0, ("uniform", 0))
    for offsets in (draws.top, draws.left):
        assert chisquare(torch.bincount(offsets, minlength=9)).pvalue > 0.01
    joint = (draws.top * 9 + draws.left) * 2 + draws.flip
    assert chisquare(torch.bincount(joint, minlength=162)).pvalue > 0.01


def test_draws_differ_between_epochs_purposes_and_seeds():
    def offsets(seed=0, stream="train", epoch=0):
        return PadCropFlip(500, seed, stream).draws(epoch).top

    assert torch.equal(offsets(), offsets())
    for other in (offsets(seed=1), offsets(stream="recalibration"), offsets(epoch=1)):
        assert 0.05 < (offsets() == other).float().mean() < 0.2  # 1/9 agree by chance


@pytest.mark.cpu
@pytest.mark.parametrize("padding", ["zero", "reflect"])
def test_pixels_equal_torchvision_for_equal_draws(padding):
    images, augmentation = pixels(), PadCropFlip(16, seed=0, pad=3, padding=padding)
    draws = augmentation.draws(0)
    mode = {"zero": "constant", "reflect": "reflect"}[padding]
    for i, view in enumerate(augmentation.apply(images, draws)):
        padded = functional.pad(images[i], 3, padding_mode=mode)
        expected = functional.crop(padded, int(draws.top[i]), int(draws.left[i]), 12, 12)
        assert torch.equal(view, functional.hflip(expected) if draws.flip[i] else expected)
    assert draws.flip.any() and not draws.flip.all()


def test_without_flip_no_image_is_mirrored():
    assert not draw_crops(1000, 4, False, 0, ("train", 0)).flip.any()


@pytest.mark.cpu
def test_one_image_at_a_time_gives_the_pixels_of_the_batch():
    images, augmentation = pixels(), PadCropFlip(16, seed=0)
    batch = augmentation.apply(images, augmentation.draws(2))
    source = MemoryImages(images, torch.zeros(16).long())
    for index in (0, 7, 15):
        assert torch.equal(augmentation.view(source, 2, index), batch[index])


def test_normalisation_equals_torchvision():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    expected = functional.normalize(pixels().float() / 255, mean, std)
    assert torch.allclose(Normalisation(mean, std)(pixels()), expected, atol=1e-5)


def test_resized_crop_is_torchvision_s_seeded_by_seed_epoch_and_index(tmp_path, write_image):
    file = write_image(tmp_path / "a.png", size=(40, 30))
    source = FileImages((str(file), str(file)), torch.zeros(2).long(), 24, 24)
    augmentation = ResizedCropFlip(24, seed=0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    views = [augmentation.view(source, epoch, index) for epoch in (0, 1) for index in (0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert len({view.numpy().tobytes() for view in views}) == 4
    torch.manual_seed(6)
    assert torch.equal(augmentation.view(source, 1, 0), views[2])

    torch.set_rng_state(seeded_generator(0, "train", "view", 0, 0).get_state())
    expected = v2.Compose([v2.RandomResizedCrop(24), v2.RandomHorizontalFlip()])(source.open(0))
    difference = functional.pil_to_tensor(expected).int() - views[0].int()  # of Pillow's rounding and torch's
    assert difference.abs().max() <= 1 and (difference == 0).float().mean() > 0.95


def test_each_image_meets_every_window_equally_often_over_epochs():
    draws = [PadCropFlip(3, seed=0).draws(epoch) for epoch in range(1500)]
    for image in range(3):
        top, left = (torch.stack([getattr(draw, side)[image] for draw in draws]) for side in ("top", "left"))
        assert chisquare(torch.bincount(top, minlength=9)).pvalue > 0.01
        assert chisquare(torch.bincount(left, minlength=9)).pvalue > 0.01
        assert abs(torch.stack([draw.flip[image] for draw in draws]).float().mean() - 0.5) < 0.04
