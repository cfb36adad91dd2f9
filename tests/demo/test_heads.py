"""The throw-away heads look where they say."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from demo.concepts import demo_concepts
from demo.heads import OTHERS_WEIGHT, SceneHead, question_states
from demo.model import DemoModel
from demo.questions import PRESENCE, with_article


@torch.inference_mode()
def test_presence_is_read_at_the_concept_and_where_the_answer_begins() -> None:
    model = DemoModel()
    concepts = ("hot dog", "sun", "fox")
    states = question_states(model, concepts)  # (concepts, wordings, 2, D)
    for row, concept in enumerate(concepts):
        for column, wording in enumerate(PRESENCE):
            sentence = model.prompt_ids(wording.format(a=with_article(concept)))
            hidden = model.below_gates([sentence], len(sentence))[0]  # (L, D)
            words = [model.tokenizer.decode([token]).strip() for token in sentence]
            place = words.index(concept.split()[-1])
            assert torch.equal(states[row, column, 0], hidden[place])
            assert torch.equal(states[row, column, 1], hidden[-1])


def test_scene_loss_is_cross_entropy_shared_by_what_is_shown() -> None:
    torch.manual_seed(0)
    head, latents = SceneHead(8), torch.randn(1, 4, 8)
    fox, key = demo_concepts().index("fox"), demo_concepts().index("key")
    pooled = latents.mean(1)
    log_p = F.log_softmax(head.concepts(pooled), -1)[0]
    others = F.cross_entropy(head.count(pooled), torch.tensor([2])) + F.cross_entropy(
        head.colour(pooled), torch.tensor([0])
    )
    expected = -(log_p[fox] + log_p[key]) / 2 + OTHERS_WEIGHT * others
    torch.testing.assert_close(head.loss(latents, [(["fox", "key"], "red")]), expected)
