"""The first test to read: text → activations → autoencoder → evaluation → index → a feature, on a tiny model."""

import json

import saekit as sk


def test_text_to_feature(tiny_model, tiny_text, tmp_path):
    store = sk.collect(tiny_model, site="blocks.1.hook_resid_post", text=tiny_text, out=tmp_path / "acts", context=64)
    assert store.rows < store.n_tokens  # BOS and separators are not stored

    sae = sk.train(sk.TopK(k=4, d_sae=128), store, out=tmp_path / "saes/topk", epochs=8, batch=512, log_every=20)
    assert (sae.d_in, sae.d_sae) == (64, 128)
    log = [json.loads(line) for line in open(tmp_path / "saes/topk/metrics.jsonl")]
    assert log[-1]["fvu"] < log[0]["fvu"]

    evaluation = sk.evaluate(sae, store)
    assert 0 < evaluation.value("fvu") < 1
    assert evaluation.value("l0") <= 4
    assert "nats with the SAE in place" in evaluation.health()

    index = sk.build_index(sae, store)
    busiest = int(index.table(sort="-n", limit=1).features[0])
    feature = index.feature(busiest)
    assert feature.n > 0
    assert "<b" in feature._repr_html_()  # tokens on which it fires are marked

    # the index and the SAE agree: the strongest firing of the feature is what encode() gives for that row
    strongest = feature.top(1)[0]
    row = int((store.row_positions() == strongest.positions[strongest.centre]).nonzero()[0][0])
    code = sae.encode(store.read(store.sites[0], row, row + 1).float()).dense()[0, busiest]
    assert abs(float(code) - float(feature.values.max())) <= 1e-3 * float(code)
