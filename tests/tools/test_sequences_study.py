"""The table of the study of sequences."""

from tools.studies.sequences import Row, table


def metrics(**changes: float) -> dict[str, float]:
    scores = {"best_psnr_db": 17.25, "mean_future_psnr_db": 15.0, "best_ssim": 0.5, "mean_future_ssim": 0.25}
    errors = {f"{name}_standard_error": 0.125 for name in scores}
    return {"kl_nats": 1.5, "mse": 0.02, "futures": 20.0, **scores, **errors, **changes}


def test_the_lowest_bits_are_first_and_a_run_without_a_bound_last() -> None:
    rows = [
        Row("mass", 0, metrics(neg_elbo_nats=9e9, neg_elbo_nats_per_frame=1e9, bits_per_dim=1.6)),
        Row("per_image", 0, metrics(neg_profile_elbo_nats=-9e9)),
        Row("worse", 0, metrics(neg_elbo_nats=5000.0, neg_elbo_nats_per_frame=714.3, bits_per_dim=8.1)),
        Row("better", 1, metrics(neg_elbo_nats=-9966.2, neg_elbo_nats_per_frame=-1423.7, bits_per_dim=7.5)),
    ]
    head, rule, *lines = table(rows).splitlines()
    assert "PSNR, best of 20 (dB)" in head
    assert head.count("|") == rule.count("|") == lines[0].count("|")
    assert lines[1].startswith("| better | 1 | -9,966 | -1,423.7 | 7.500 | 1.50 | 0.0200 | 17.25 +- 0.12 |")
    assert [line.split(" | ")[0] for line in lines] == ["| mass", "| better", "| worse", "| per_image"]
    assert "| none | none | none |" in lines[3]


def test_true_and_copied_frames_follow_where_there_are_distances() -> None:
    kinds = ("true", "means", "draws", "copied")
    distances = {f"frechet_{level}_{kind}": 1.5 for level in ("frames", "videos") for kind in kinds}
    row = Row("optimal", 0, metrics(neg_elbo_nats=1.0, neg_elbo_nats_per_frame=1.0, **distances))
    head, rule, *lines = table([row]).splitlines()
    assert {line.count("|") for line in (rule, *lines)} == {head.count("|")}
    assert lines[0].endswith("| 0.250 +- 0.125 | 1.500 | 1.500 | 1.500 | 1.500 |")
    assert lines[1].startswith("| (true sequences) | - |")
    assert lines[2].endswith("| - | 1.500 | - | 1.500 | - |")
