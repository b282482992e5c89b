// The native step by itself, for sanitizers: random weights, rows in pieces and in company, an adapter, in one thread
// and in three. Prints what differs; status 1 where anything does.

#include "step.cpp"

#include <cstdio>
#include <cstdlib>

namespace {

constexpr int64_t HIDDEN = 64, HEADS = 4, KV_HEADS = 2, SIZE = 32, INNER = 96, LAYERS = 2, VOCABULARY = 70, ROOM = 256;
constexpr int64_t RANK = 3, LENGTH = 150;

struct Floating {
    std::vector<float> numbers;
    explicit Floating(int64_t count) : numbers(count) {
        for (float &one : numbers) one = float(std::rand()) / float(RAND_MAX) - 0.5f;
    }
    float *data() { return numbers.data(); }
};

struct Weight {
    std::vector<int8_t> whole;
    std::vector<float> packed, scale;
    std::vector<int32_t> sums;
    Linear part;

    Weight(int64_t outputs, int64_t inputs, bool is_int8) {
        const int64_t room = (outputs + PANEL - 1) / PANEL * PANEL;
        Floating weight(outputs * inputs);
        if (is_int8) {
            std::vector<int8_t> rounded;
            for (float one : weight.numbers) rounded.push_back(int8_t(one * 250));
            whole.resize(room * ((inputs + 3) / 4 * 4)), sums.resize(room), scale.resize(room, 0.004f);
            native_pack_int8(rounded.data(), outputs, inputs, whole.data(), sums.data());
            part = {outputs, inputs, whole.data(), scale.data(), sums.data(), nullptr};
        } else {
            packed.resize(room * inputs);
            native_pack_float(weight.data(), outputs, inputs, packed.data());
            part = {outputs, inputs, packed.data(), nullptr, nullptr, nullptr};
        }
    }
};

struct Parts {
    Floating norm{HIDDEN}, heads_norm{(HEADS + KV_HEADS) * SIZE}, embedding{LENGTH * HIDDEN}, cos{ROOM * SIZE / 2},
        sin{ROOM * SIZE / 2}, bias{2 * INNER};
    Weight inputs, output, gate_up, down, head, thin_down{RANK, HIDDEN, false}, thin_up{2 * INNER, RANK, false};
    std::vector<Layer> layers;
    std::vector<Thin> thin;
    Model model;

    explicit Parts(bool is_int8)
        : inputs((HEADS + 2 * KV_HEADS) * SIZE, HIDDEN, is_int8), output(HIDDEN, HEADS * SIZE, is_int8),
          gate_up(2 * INNER, HIDDEN, is_int8), down(HIDDEN, INNER, is_int8), head(VOCABULARY, HIDDEN, is_int8) {
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
        std::vector<char> scratch(native_scratch(&parts.model, rows * count, RANK));
        const Batch batch{rows * count,       rows,          1,          rows,        x.data(),      wanted.data(),
                          segments.data(),    &group,        parts.cos.data(), parts.sin.data(), last.data(), logits.data(),
                          scratch.data()};
        native_step(&parts.model, &batch, RANK, threads, nullptr);
    }
    const float *own = logits.data() + (company ? VOCABULARY : 0);
    return {own, own + VOCABULARY};
}

} // namespace

int main() {
    int wrong = 0;
    for (int is_int8 = 0; is_int8 < 2; is_int8++) {
        Parts parts(is_int8);
        const std::vector<float> whole = run(parts, LENGTH, false, 1);
        for (int64_t piece : {1, 13, 64, 150})
            for (int company = 0; company < 2; company++)
                for (int threads : {1, 3})
                    if (std::memcmp(run(parts, piece, company, threads).data(), whole.data(), 4 * VOCABULARY)) {
                        std::printf("int8 %d piece %d company %d threads %d\n", is_int8, int(piece), company, threads);
                        wrong = 1;
                    }
    }
    return wrong;
}
