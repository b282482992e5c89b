"""Windows: what a step sees, on every rank, whatever the layout; and a row as tensors."""

from dataclasses import replace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader

from qwen_chat.chat.encoded import Encoded
from qwen_chat.errors import DataError, OptionError
from qwen_chat.training.batches import Collator, RowDataset, WindowSampler
from qwen_chat.training.packing import PackedRow
from tests.support.tiny_models import mixed_data


def numbered(count, length=6):
    return [(Encoded([i] * length, [(3, length)]),) for i in range(count)]


def test_a_step_sees_the_same_conversations_in_every_layout_and_split():
    data = numbered(53)
    seen = set()
    for layout in ("shared_prefix", "packed", "padded"):
        for batch_size, accumulation, ranks in [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)]:
            sampler = WindowSampler(
                data,
                batch_size=batch_size,
                accumulation=accumulation,
                ranks=ranks,
                max_length=10,
                layout=layout,
                seed=3,
            )
            rows = [batch[0] for batch in sampler]
            assert len(rows) == len(sampler) == 7 * accumulation * ranks
            steps = [rows[i : i + accumulation * ranks] for i in range(0, len(rows), accumulation * ranks)]
            members = [sorted(c for row in step for c in row.conversations) for step in steps]
            assert members == [sorted(sampler.conversations(step)) for step in range(7)]
            assert max(row.tokens for row in rows) <= batch_size * 10
            seen.add(str(members))
    assert len(seen) == 1


def test_epochs_differ_and_repeat():
    sampler = WindowSampler(numbered(20), batch_size=4, max_length=10, seed=1)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(WindowSampler(numbered(20), batch_size=4, max_length=10, seed=2)) != first
    assert sorted(c for [row] in second for c in row.conversations) == list(range(20))
    assert sampler.conversations(5) == [int(i) for i in sampler.order(1)[:4]]


def test_accelerate_deals_rows_to_ranks_and_skips():
    sampler = WindowSampler(numbered(21), batch_size=2, accumulation=2, ranks=2, max_length=10)
    everything = list(sampler)
    for rank in range(2):
        assert list(BatchSamplerShard(sampler, 2, rank)) == everything[rank::2]
    loader = prepare_data_loader(
        DataLoader(RowDataset(numbered(21)), batch_sampler=sampler, collate_fn=Collator())
    )
    loader.set_epoch(4)
    assert sampler.epoch == 4
    loader.set_epoch(0)
    resumed = list(skip_first_batches(loader, 5))
    whole = list(loader)
    assert len(resumed) == len(whole) - 5
    for one, other in zip(resumed, whole[5:], strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])


def test_epoch_reaches_the_sampler_behind_ranks():
    sampler = WindowSampler(numbered(21), batch_size=2, ranks=2, max_length=10)
    loader = prepare_data_loader(
        DataLoader(RowDataset(numbered(21)), batch_sampler=sampler, collate_fn=Collator()),
        num_processes=2,
        process_index=1,
    )
    loader.set_epoch(3)
    assert sampler.epoch == 3


def test_last_window_is_filled_for_every_rank():
    sampler = WindowSampler(numbered(1), batch_size=2, accumulation=2, ranks=3, max_length=10)
    rows = [row for [row] in sampler]
    assert sorted(len(row.sequences) for row in rows) == [0, 0, 0, 0, 0, 1]
    batch = Collator()([RowDataset(numbered(1))[next(row for row in rows if not row.sequences)]])
    assert batch["input_ids"].tolist() == [[0]] and batch["segments"].tolist() == [[0, 1, 1]]
    assert batch["logits_to_keep"].shape == (0,) and batch["labels"].shape == (1, 0)


def test_collated_row():
    prefix = list(range(20, 40))
    first = Encoded([*prefix, 1, 2], [(20, 22)])
    second = Encoded([*prefix, 3, 4, 5], [(21, 23)])
    row = PackedRow(((0, 0), (1, 0)), (22, 23), (0, 20))
    batch = Collator()([(row, [first, second])])
    assert batch["input_ids"].tolist() == [[*prefix, 1, 2, 3, 4, 5]]
    assert batch["position_ids"].tolist() == [[*range(22), 20, 21, 22]]
    assert batch["segments"].tolist() == [[0, 20, 25], [20, 22, 22], [22, 25, 25]]
    assert batch["logits_to_keep"].tolist() == [
        19,
        20,
        22,
        23,
    ]  # the prefix's last token predicts for the first
    assert batch["labels"].tolist() == [[1, 2, 4, 5]]
    assert batch["shift_labels"] is batch["labels"]
    assert batch["owners"].tolist() == [0, 0, 1, 1]
    balanced = Collator(balanced=True)([(replace(row, step_sequences=5), [first, second])])
    assert (balanced["last_tokens"].tolist(), balanced["step_sequences"].tolist()) == ([21, 24], [5])
    assert balanced.keys() - batch.keys() == {"last_tokens", "step_sequences"}


def test_padded_row_pads_to_its_longest():
    data = mixed_data()
    sampler = WindowSampler(
        data, batch_size=3, accumulation=3, max_length=200, layout="padded", shuffle=False
    )
    rows = [row for [row] in sampler]
    for row in rows:
        assert row.tokens == max(row.lengths) * len(row.lengths)
        batch = Collator()([RowDataset(data)[row]])
        assert batch["input_ids"].shape == batch["position_ids"].shape == (1, row.tokens)
    assert sampler.longest_row() == (max(row.tokens for row in rows), max(row.held for row in rows))


def test_bad_input():
    with pytest.raises(OptionError, match="--layout: 'dense'"):
        WindowSampler(numbered(1), batch_size=1, max_length=10, layout="dense")
    with pytest.raises(DataError, match="no conversation is left"):
        WindowSampler([], batch_size=1, max_length=10)
    with pytest.raises(
        DataError, match="conversation 0: 6 tokens; expected at most 5; raise --model_max_length"
    ):
        list(WindowSampler(numbered(1), batch_size=1, max_length=5))
    with pytest.raises(ValueError, match="a batch is one row; found 2"):
        Collator()([(PackedRow((), (), ()), []), (PackedRow((), (), ()), [])])
