from dino.data.pseudo_labels import count_scores, scores_ignored


def test_scores_are_named():
    assert count_scores([{"score": 0.5}, {}, {"score": None}]) == 2
    assert scores_ignored("a.json", 2).startswith("a.json: 2 annotations with a score")
    assert scores_ignored("a.json", 1).startswith("a.json: 1 annotation with")


def test_annotations_have_none():
    assert scores_ignored("a.json", count_scores([{"id": 1}])) is None
