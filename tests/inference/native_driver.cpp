// The native step by itself, for sanitizers: random weights, rows in pieces and in company, an adapter, in one thread
// and in three. Prints what differs; status 1 where anything does.

#include "step.cpp"

#include <cstdio>
#include <cstdlib>

namespace {

constexpr int64_t HIDDEN = 64, HEADS = 4, KV_HEADS = 2, SIZE = 32, INNER = 96, LAYERS = 2, VOCABULARY = 70, ROOM = 640;
constexpr int64_t RANK = 3, LENGTH = 600;

struct Floating {
    std::vector<float> numbers;
    explicit Floating(int64_t count) : numbers(count) {
        for (float &one : numbers) one = float(std::rand()) / float(RAND_MAX) - 0.5f;
    }
    float *data() { return numbers.data(); }
};

enum Kind { FLOAT, INT8, INT4 };

struct Weight {
    std::vector<int8_t> whole;
    std::vector<uint8_t> grouped;
    std::vector<float> packed, scale;
    std::vector<int32_t> sums;
    Linear part;

    Weight(int64_t outputs, int64_t inputs, Kind kind) {
        const int64_t room = (outputs + PANEL - 1) / PANEL * PANEL;
        Floating weight(outputs * inputs);
        if (kind == INT4) {
            std::vector<int32_t> rounded;
            for (float one : weight.numbers) rounded.push_back(int32_t((one + 0.5f) * 15));
            const std::vector<uint16_t> scales(inputs / 32 * outputs * 2, 0x3d00); // 0.03125
            grouped.resize(room * inputs / 32 * 20);
            native_pack_int4(rounded.data(), scales.data(), outputs, inputs, 32, grouped.data());
            part = {outputs, inputs, grouped.data(), nullptr, nullptr, nullptr, 32};
        } else if (kind == INT8) {
            whole.resize(room * ((inputs + 3) / 4 * 4)), sums.resize(room), scale.resize(room);
            native_pack_int8(weight.data(), 0, outputs, inputs, whole.data(), scale.data(), sums.data());
            part = {outputs, inputs, whole.data(), scale.data(), sums.data(), nullptr, 0};
        } else {
            packed.resize(room * inputs);
            native_pack_float(weight.data(), 0, outputs, inputs, packed.data());
            part = {outputs, inputs, packed.data(), nullptr, nullptr, nullptr, 0};
        }
    }
};

struct Parts {
    Floating norm{HIDDEN}, heads_norm{(HEADS + KV_HEADS) * SIZE}, embedding{LENGTH * HIDDEN}, cos{ROOM * SIZE / 2},
        sin{ROOM * SIZE / 2}, bias{2 * INNER};
    Weight inputs, output, gate_up, down, head, thin_down{RANK, HIDDEN, FLOAT},
        thin_up{2 * INNER, RANK, FLOAT};
    std::vector<Layer> layers;
    std::vector<Thin> thin;
    Model model;

    explicit Parts(Kind kind)
        : inputs((HEADS + 2 * KV_HEADS) * SIZE, HIDDEN, kind), output(HIDDEN, HEADS * SIZE, kind),
          gate_up(2 * INNER, HIDDEN, kind), down(HIDDEN, INNER, kind), head(VOCABULARY, HIDDEN, kind) {
        for (int64_t l = 0; l < LAYERS; l++)
            layers.push_back({norm.data(), l ? heads_norm.data() : nullptr, norm.data(), l ? 37 : 0, inputs.part,
                              output.part, gate_up.part, down.part});
        thin.resize(4 * LAYERS);
        thin[2] = {thin_down.part, thin_up.part, bias.data()};
        model = {HIDDEN, HEADS, KV_HEADS, SIZE, SIZE, INNER, LAYERS, VOCABULARY, 1e-6f, 63, 64, layers.data(),
                 norm.data(), head.part};
    }
};

// The last logits of a row of LENGTH tokens in pieces of `piece`, behind a row without the adapter.
std::vector<float> run(Parts &parts, int64_t piece, bool company, int threads) {
    const int64_t row = 2 * KV_HEADS * ROOM * SIZE;
    std::vector<float> kv(LAYERS * 2 * row), logits(2 * VOCABULARY), last(2 * HIDDEN);
    for (int64_t begin = 0; begin < LENGTH; begin += piece) {
        const int64_t count = piece < LENGTH - begin ? piece : LENGTH - begin, rows = company ? 2 : 1;
        std::vector<Segment> segments;
        std::vector<float> x;
        std::vector<int64_t> wanted;
        for (int64_t i = 0; i < rows; i++) {
            segments.push_back({begin, count, kv.data() + i * row, 2 * row, ROOM});
            const float *from = parts.embedding.data() + begin * HIDDEN;
            x.insert(x.end(), from, from + count * HIDDEN);
            wanted.push_back((i + 1) * count - 1);
        }
        const Group group{(rows - 1) * count, rows * count, parts.thin.data()};
        std::vector<char> scratch(native_scratch(&parts.model, rows * count, RANK, LENGTH));
        const Batch batch{rows * count,       rows,          1,          rows,        x.data(),      wanted.data(),
                          segments.data(),    &group,        parts.cos.data(), parts.sin.data(), last.data(), logits.data(),
                          scratch.data()};
        native_step(&parts.model, &batch, RANK, LENGTH, threads, nullptr);
    }
    const float *own = logits.data() + (company ? VOCABULARY : 0);
    return {own, own + VOCABULARY};
}

} // namespace

int main() {
    int wrong = 0;
    for (Kind kind : {FLOAT, INT8, INT4}) {
        Parts parts(kind);
        const std::vector<float> whole = run(parts, LENGTH, false, 1);
        for (int64_t piece : {1, 13, 64, 600})
            for (int company = 0; company < 2; company++)
                for (int threads : {1, 3})
                    if (std::memcmp(run(parts, piece, company, threads).data(), whole.data(), 4 * VOCABULARY)) {
                        std::printf("kind %d piece %d company %d threads %d\n", kind, int(piece), company, threads);
                        wrong = 1;
                    }
    }
    return wrong;
}
