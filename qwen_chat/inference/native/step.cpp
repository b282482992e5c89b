// One step of a dense decoder on a CPU: every layer and the head, for any tokens of any rows, in one parallel region.
//
// In: pointers to packed weights, to rows' keys and values, token ids. Out: keys and values written, logits.
//
// Every sum has an order that depends on its own length and position alone: a number is computed by one thread, in
// one chain, whatever other rows there are, however a prompt was cut, and however many threads there are. Products of
// whole numbers are exact in any order. No multiplication and addition are fused but where `fma` says so
// (-ffp-contract=off), so that the same row gets the same bits from each copy that the compiler makes of a loop.
//
// A weight lies in panels of PANEL outputs: for floats [inputs][PANEL], for int8 [inputs / 4][PANEL][4].

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int W = 16;
constexpr int TILE_ROWS = 12;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int W = 8;
constexpr int TILE_ROWS = 6;
#else
constexpr int W = 4;
constexpr int TILE_ROWS = 4;
#endif
constexpr int PANEL = 2 * W;
constexpr int KEYS = 64;          // keys that are scored before the running maximum moves
constexpr int QUERIES = 8;        // queries that go over one tile of keys together
constexpr int HEAD_LIMIT = 256;   // numbers of a head
constexpr int64_t ROW_BLOCK = 48; // rows that one thread multiplies with a panel at a time

typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Whole __attribute__((vector_size(4 * W)));
typedef uint8_t Bytes __attribute__((vector_size(W)));

inline Floats load(const float *p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float *p, Floats v) { std::memcpy(p, &v, sizeof v); }
inline Floats splat(float x) { return Floats{} + x; }

inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// sum += products of four bytes each: a unsigned, the same four for every output; b signed
inline Whole dot4(Whole sum, const uint8_t *a, const int8_t *b) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    int32_t four;
    std::memcpy(&four, a, 4);
    const __m512i left = _mm512_set1_epi32(four), right = _mm512_loadu_si512(b);
#if defined(__AVX512VNNI__)
    return (Whole)_mm512_dpbusd_epi32((__m512i)sum, left, right);
#else
    const __m512i pairs = _mm512_maddubs_epi16(left, right);
    return (Whole)_mm512_add_epi32((__m512i)sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
#elif defined(__AVX2__) && defined(__FMA__)
    int32_t four;
    std::memcpy(&four, a, 4);
    const __m256i left = _mm256_set1_epi32(four), right = _mm256_loadu_si256((const __m256i *)b);
    const __m256i pairs = _mm256_maddubs_epi16(left, right);
    return (Whole)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
    for (int lane = 0; lane < W; lane++)
        for (int i = 0; i < 4; i++) sum[lane] += int32_t(a[i]) * int32_t(b[4 * lane + i]);
    return sum;
#endif
}

inline Floats to_floats(Whole v) { return __builtin_convertvector(v, Floats); }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats magnitude(Floats v) { return (Floats)((Whole)v & 0x7fffffff); }

inline float sum_of(Floats v) {
    float parts[W];
    store(parts, v);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return parts[0];
}
inline float largest_of(Floats v) {
    float parts[W];
    store(parts, v);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) parts[i] = parts[i] > parts[i + half] ? parts[i] : parts[i + half];
    return parts[0];
}

// Neighbours added: the sums of a's pairs, then of b's.
inline Floats pair_sums(Floats a, Floats b) {
    Whole even, odd;
    for (int i = 0; i < W; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}
// Lane i: the sum of v[i].
inline Floats sums_of(Floats *v) {
#pragma GCC unroll 8
    for (int count = W; count > 1; count /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < count / 2; i++) v[i] = pair_sums(v[2 * i], v[2 * i + 1]);
    return v[0];
}

// e^x to about one unit in the last place: 2^n times a polynomial of what is left.
inline Floats exponential(Floats x) {
    x = larger(x, splat(-87.3f));
    x = x < splat(88.3f) ? x : splat(88.3f);
    const Floats magic = splat(12582912.0f), shifted = fma(x, splat(1.44269504f), magic), n = shifted - magic;
    Floats r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    Floats p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + splat(1.0f);
    const Whole power = (((Whole)shifted - (Whole)magic) + 127) << 23;
    return p * (Floats)power;
}

} // namespace

extern "C" {

struct Linear {
    int64_t outputs, inputs;
    const void *weight;
    const float *scale;   // int8: of each output; null: floats
    const int32_t *sums;  // int8: of each output's weights
    const float *bias;    // or null
};

// What an adapter adds to one linear layer: up(down(x)) + bias.
struct Thin {
    Linear down, up;  // outputs 0: none
    const float *bias; // or null
};

struct Layer {
    const float *mixer_norm, *heads_norm, *feed_norm; // heads_norm (heads + kv heads, head size), or null
    int64_t window;                                   // tokens that a token attends to, 0: all
    Linear inputs, output, gate_up, down;
};

struct Model {
    int64_t hidden, heads, kv_heads, head_dim, rotary, inner, layer_count, vocabulary;
    float eps;
    int32_t levels, zero; // of int8 activations
    const Layer *layers;
    const float *norm;
    Linear head;
};

// The next `count` tokens of one row, from position `start`. kv: the row's (2 x kv heads, capacity, head size) of layer
// 0; the next layer's is `stride` numbers further.
struct Segment {
    int64_t start, count;
    float *kv;
    int64_t stride, capacity;
};

// Tokens that share an adapter; thin: (layers, 4) in the order of Layer's products.
struct Group {
    int64_t begin, end;
    const Thin *thin;
};

struct Batch {
    int64_t tokens, segment_count, group_count, wanted_count;
    float *x;              // (tokens, hidden): the tokens' embeddings, which the layers are added to
    const int64_t *wanted; // tokens whose logits are asked for
    const Segment *segments;
    const Group *groups;
    const float *cos, *sin; // by position, (positions, rotary / 2)
    float *last;            // (wanted, hidden): what the head is given
    float *logits;          // (wanted, vocabulary)
    char *scratch;          // step_scratch bytes
};

// An OpenMP runtime's way to run a function in its threads, and to tell how many came; null: threads of our own.
struct Runtime {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    int (*count)();
};
}

namespace {

inline void breathe() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

// The threads that work on one step: they meet at barriers, and take pieces of work by number.
struct Team {
    alignas(64) std::atomic<int> tickets{0};
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> meetings{0};
    alignas(64) std::atomic<int64_t> taken{0};
    int count = 1;

    void meet() {
        if (count == 1) return;
        const int now = meetings.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
            arrived.store(0, std::memory_order_relaxed);
            taken.store(0, std::memory_order_relaxed);
            meetings.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; meetings.load(std::memory_order_acquire) == now; spins++) {
            if (spins < 4000)
                breathe();
            else
                std::this_thread::yield();
        }
    }

    // Run piece(i) for each i < pieces, `grain` neighbours a thread at a time; returns when all are done.
    template <class Piece> void share(int64_t pieces, int64_t grain, Piece piece) {
        if (count == 1) {
            for (int64_t i = 0; i < pieces; i++) piece(i);
            return;
        }
        for (;;) {
            const int64_t first = taken.fetch_add(grain, std::memory_order_relaxed);
            if (first >= pieces) break;
            for (int64_t i = first; i < first + grain && i < pieces; i++) piece(i);
        }
        meet();
    }
};

// Threads of our own, for where no OpenMP runtime is at hand: they stay, look for work a while, then sleep.
class Pool {
  public:
    static Pool &get() {
        static Pool pool;
        return pool;
    }
    void run(int count, void (*work)(void *), void *data) {
        std::unique_lock<std::mutex> held(mutex_);
        while (int(threads_.size()) < count - 1) {
            const int number = int(threads_.size());
            const int64_t seen = round_.load();
            threads_.emplace_back([this, number, seen] { serve(number, seen); });
        }
        work_ = work, data_ = data, count_ = count;
        busy_.store(count - 1);
        round_.fetch_add(1);
        held.unlock();
        wake_.notify_all();
        work(data);
        for (int spins = 0; busy_.load(std::memory_order_acquire);)
            if (spins++ < 4000)
                breathe();
            else
                std::this_thread::yield();
    }

  private:
    void serve(int number, int64_t seen) {
        for (;;) {
            for (int spins = 0; round_.load(std::memory_order_acquire) == seen && spins < 20000; spins++) breathe();
            std::unique_lock<std::mutex> held(mutex_);
            wake_.wait(held, [&] { return round_.load() != seen || ends_; });
            if (ends_) return;
            seen = round_.load();
            if (number >= count_ - 1) continue;
            auto work = work_;
            void *data = data_;
            held.unlock();
            work(data);
            busy_.fetch_sub(1, std::memory_order_acq_rel);
        }
    }
    ~Pool() {
        {
            std::lock_guard<std::mutex> held(mutex_);
            ends_ = true;
        }
        wake_.notify_all();
        for (auto &thread : threads_) thread.join();
    }
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> threads_;
    std::atomic<int64_t> round_{0};
    std::atomic<int> busy_{0};
    void (*work_)(void *) = nullptr;
    void *data_ = nullptr;
    int count_ = 0;
    bool ends_ = false;
};

// The rows of a product's input: floats, and where the weight is int8 their whole numbers and scales.
struct Rows {
    const float *x;
    int64_t width; // numbers from a row to the next
    const uint8_t *whole;
    int64_t whole_width;
    const float *scale;
    Rows from(int64_t row) const {
        return {x + row * width, width, whole + row * whole_width, whole_width, scale + row};
    }
};

// The end of a product: `count` outputs of one row, from two vectors.
inline void finish(Floats low, Floats high, int64_t count, float *y, bool adds) {
    if (count >= PANEL) {
        if (adds) low = load(y) + low, high = load(y + W) + high;
        store(y, low), store(y + W, high);
        return;
    }
    float found[PANEL];
    store(found, low), store(found + W, high);
    for (int64_t i = 0; i < count; i++) y[i] = adds ? y[i] + found[i] : found[i];
}

// The bias is padded to whole panels, as scale and sums are.
template <int M>
void multiply_floats(const Linear &w, int64_t panel, const Rows &rows, float *y, int64_t width, bool adds) {
    const float *weight = (const float *)w.weight + panel * PANEL * w.inputs;
    Floats low[M], high[M];
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) low[m] = high[m] = Floats{};
    const float *x = rows.x;
    const int64_t ld = rows.width;
    for (int64_t k = 0; k < w.inputs; k++, weight += PANEL) {
        const Floats a = load(weight), b = load(weight + W);
        if (M <= 4) __builtin_prefetch(weight + 12 * PANEL), __builtin_prefetch(weight + 12 * PANEL + W);
#pragma GCC unroll 12
        for (int m = 0; m < M; m++) {
            const Floats left = splat(x[m * ld + k]);
            low[m] = fma(left, a, low[m]), high[m] = fma(left, b, high[m]);
        }
    }
    const int64_t first = panel * PANEL;
    const Floats bias_low = w.bias ? load(w.bias + first) : Floats{};
    const Floats bias_high = w.bias ? load(w.bias + first + W) : Floats{};
#pragma GCC unroll 12
    for (int m = 0; m < M; m++)
        finish(low[m] + bias_low, high[m] + bias_high, w.outputs - first, y + m * width + first, adds);
}

template <int M>
void multiply_whole(const Linear &w, int32_t zero, int64_t panel, const Rows &rows, float *y, int64_t width,
                    bool adds) {
    const int64_t fours = (w.inputs + 3) / 4;
    const int8_t *weight = (const int8_t *)w.weight + panel * PANEL * fours * 4;
    Whole low[M], high[M];
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) low[m] = high[m] = Whole{};
    const uint8_t *x = rows.whole;
    const int64_t ld = rows.whole_width;
    for (int64_t k = 0; k < fours; k++, weight += 4 * PANEL) {
        if (M <= 8) __builtin_prefetch(weight + 48 * PANEL), __builtin_prefetch(weight + 48 * PANEL + 4 * W);
#pragma GCC unroll 12
        for (int m = 0; m < M; m++) {
            low[m] = dot4(low[m], x + m * ld + 4 * k, weight);
            high[m] = dot4(high[m], x + m * ld + 4 * k, weight + 4 * W);
        }
    }
    const int64_t first = panel * PANEL;
    Whole sums_low, sums_high;
    std::memcpy(&sums_low, w.sums + first, sizeof sums_low);
    std::memcpy(&sums_high, w.sums + first + W, sizeof sums_high);
    const Floats scale_low = load(w.scale + first), scale_high = load(w.scale + first + W);
    const Floats bias_low = w.bias ? load(w.bias + first) : Floats{};
    const Floats bias_high = w.bias ? load(w.bias + first + W) : Floats{};
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
        Floats a = to_floats(low[m] - zero * sums_low) * scale_low * splat(rows.scale[m]);
        Floats b = to_floats(high[m] - zero * sums_high) * scale_high * splat(rows.scale[m]);
        if (w.bias) a = a + bias_low, b = b + bias_high;
        finish(a, b, w.outputs - first, y + m * width + first, adds);
    }
}

template <int M>
void multiply_rows(int64_t rows, const Linear &w, int32_t zero, int64_t panel, const Rows &x, float *y, int64_t width,
                   bool adds) {
    if (rows == M) {
        if (w.scale)
            multiply_whole<M>(w, zero, panel, x, y, width, adds);
        else
            multiply_floats<M>(w, panel, x, y, width, adds);
        return;
    }
    if constexpr (M > 1) multiply_rows<M - 1>(rows, w, zero, panel, x, y, width, adds);
}

// y (rows, width) = or += the product of all rows.
void multiply(Team &team, const Linear &w, int32_t zero, const Rows &x, int64_t rows, float *y, int64_t width,
              bool adds) {
    const int64_t panels = (w.outputs + PANEL - 1) / PANEL, blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
    const int64_t grain = panels / (16 * team.count) > 1 ? panels / (16 * team.count) : 1;
    team.share(panels * blocks, grain < 8 ? grain : 8, [&](int64_t piece) {
        const int64_t panel = piece / blocks, begin = piece % blocks * ROW_BLOCK;
        const int64_t end = begin + ROW_BLOCK < rows ? begin + ROW_BLOCK : rows;
        for (int64_t row = begin; row < end; row += TILE_ROWS) {
            const int64_t count = end - row < TILE_ROWS ? end - row : TILE_ROWS;
            multiply_rows<TILE_ROWS>(count, w, zero, panel, x.from(row), y + row * width, width, adds);
        }
    });
}

// Rounded to whole numbers between zero - levels and zero + levels. x has `width` numbers, a multiple of 4 W or not.
void round_row(const float *x, int64_t width, int32_t levels, int32_t zero, uint8_t *whole, float *scale) {
    Floats most{};
    int64_t i = 0;
    for (; i + W <= width; i += W) most = larger(most, magnitude(load(x + i)));
    float top = largest_of(most);
    for (; i < width; i++) {
        const float one = x[i] < 0 ? -x[i] : x[i];
        top = top > one ? top : one;
    }
    const float step = fma(splat(top), splat(float(1.0 / levels)), splat(1e-12f))[0];
    *scale = step;
    const Floats by = splat(step), shift = splat(float(zero)), magic = splat(12582912.0f);
    for (i = 0; i < width; i += W) {
        Floats v;
        const int64_t count = width - i < W ? width - i : W;
        if (count == W) {
            v = load(x + i);
        } else {
            float part[W] = {};
            std::memcpy(part, x + i, 4 * count);
            v = load(part);
        }
        // Adding 1.5 x 2^23 rounds to a whole number, halves to the even one.
        const Whole found = (Whole)(v / by + shift + magic) - (Whole)magic;
        const Bytes bytes = __builtin_convertvector(found, Bytes);
        std::memcpy(whole + i, &bytes, count);
    }
    for (; width % 4; width++) whole[width] = 0;
}

// y = x / sqrt(mean(x^2) + eps) * weight
void scale_row(const float *x, int64_t width, const float *weight, float eps, float *y) {
    Floats sum{}, more{};
    int64_t i = 0;
    for (; i + 2 * W <= width; i += 2 * W) {
        const Floats a = load(x + i), b = load(x + i + W);
        sum = fma(a, a, sum), more = fma(b, b, more);
    }
    for (; i < width; i += W) {
        const Floats a = load(x + i);
        sum = fma(a, a, sum);
    }
    const float by = 1.0f / __builtin_sqrtf(sum_of(sum + more) / float(width) + eps);
    for (i = 0; i < width; i += W) store(y + i, load(x + i) * splat(by) * load(weight + i));
}

// y = silu(gate) * up
void gate_row(const float *gate, const float *up, int64_t width, float *y) {
    for (int64_t i = 0; i < width; i += W) {
        const Floats g = load(gate + i);
        store(y + i, g / (splat(1.0f) + exponential(-g)) * load(up + i));
    }
}

// Each pair (i, i + rotary / 2) of a head turned by its angle, in place.
void turn_head(float *x, int64_t half, const float *cos, const float *sin) {
    int64_t i = 0;
    for (; i + W <= half; i += W) {
        const Floats a = load(x + i), b = load(x + i + half), c = load(cos + i), s = load(sin + i);
        store(x + i, a * c - b * s);
        store(x + i + half, b * c + a * s);
    }
    for (; i < half; i++) {
        const float a = x[i], b = x[i + half], c = cos[i], s = sin[i];
        x[i] = a * c - b * s;
        x[i + half] = b * c + a * s;
    }
}

struct Query {
    const float *q;
    float *y;
    int64_t first, end; // keys
};

// Softmax attention of up to QUERIES queries of one head. What a query computes depends on its own range alone.
void attend(const Query *queries, int count, const float *keys, const float *values, int size, float scale) {
    alignas(64) float found[QUERIES][HEAD_LIMIT];
    Floats total[QUERIES];
    float most[QUERIES];
    int64_t begin = queries[0].first, end = 0;
    for (int i = 0; i < count; i++) {
        begin = queries[i].first < begin ? queries[i].first : begin;
        end = queries[i].end > end ? queries[i].end : end;
        total[i] = Floats{}, most[i] = -__builtin_inff();
        std::memset(found[i], 0, 4 * size);
    }
    for (int64_t tile = begin / KEYS * KEYS; tile < end; tile += KEYS)
        for (int i = 0; i < count; i++) {
            const int64_t from = queries[i].first > tile ? queries[i].first : tile;
            const int64_t to = queries[i].end < tile + KEYS ? queries[i].end : tile + KEYS;
            if (from >= to) continue;
            alignas(64) float score[KEYS];
            const int64_t first = (from - tile) / W * W, last = (to - tile + W - 1) / W * W;
            Floats top = splat(-__builtin_inff());
            for (int64_t block = first; block < last; block += W) {
                Floats products[W];
                const float *key = keys + (tile + block) * size, *q = queries[i].q;
#pragma GCC unroll 16
                for (int k = 0; k < W; k++) products[k] = Floats{};
                for (int d = 0; d < size; d += W) {
                    const Floats left = load(q + d);
#pragma GCC unroll 16
                    for (int k = 0; k < W; k++) products[k] = fma(left, load(key + k * size + d), products[k]);
                }
                store(score + block, sums_of(products) * splat(scale));
                for (int k = 0; k < W; k++)
                    if (tile + block + k < from || tile + block + k >= to) score[block + k] = -__builtin_inff();
                top = larger(load(score + block), top);
            }
            const float now = largest_of(top);
            if (now > most[i]) {
                const float shrink = exponential(splat(most[i] - now))[0];
                for (int d = 0; d < size; d += W) store(found[i] + d, load(found[i] + d) * splat(shrink));
                total[i] = total[i] * splat(shrink);
                most[i] = now;
            }
            for (int64_t block = first; block < last; block += W) {
                const Floats s = load(score + block), p = exponential(s - splat(most[i]));
                const Floats seen = s == splat(-__builtin_inff()) ? Floats{} : p;
                store(score + block, seen);
                total[i] = total[i] + seen;
            }
            for (int d = 0; d < size; d += 4 * W) {
                const int parts = size - d < 4 * W ? (size - d) / W : 4;
                const float *value = values + d;
                if (parts == 4) {
                    Floats a = load(found[i] + d), b = load(found[i] + d + W), c = load(found[i] + d + 2 * W),
                           e = load(found[i] + d + 3 * W);
                    for (int64_t k = from; k < to; k++) {
                        const Floats p = splat(score[k - tile]);
                        const float *v = value + k * size;
                        a = fma(p, load(v), a), b = fma(p, load(v + W), b);
                        c = fma(p, load(v + 2 * W), c), e = fma(p, load(v + 3 * W), e);
                    }
                    store(found[i] + d, a), store(found[i] + d + W, b);
                    store(found[i] + d + 2 * W, c), store(found[i] + d + 3 * W, e);
                } else {
                    for (int part = 0; part < parts; part++) {
                        Floats a = load(found[i] + d + part * W);
                        for (int64_t k = from; k < to; k++)
                            a = fma(splat(score[k - tile]), load(value + k * size + part * W), a);
                        store(found[i] + d + part * W, a);
                    }
                }
            }
        }
    for (int i = 0; i < count; i++) {
        const Floats by = splat(sum_of(total[i]));
        for (int d = 0; d < size; d += W) store(queries[i].y + d, load(found[i] + d) / by);
    }
}

inline int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The numbers that a step works on, in one piece of memory.
struct Space {
    float *inner, *wide, *thin, *scale;
    uint8_t *whole;
    int64_t inner_width, wide_width, whole_width, bytes;

    Space(const Model &m, int64_t tokens, int64_t rank, char *base) {
        const int64_t attended = m.heads * m.head_dim, joined = (m.heads + 2 * m.kv_heads) * m.head_dim;
        inner_width = m.hidden > attended ? m.hidden : attended;
        inner_width = inner_width > m.inner ? inner_width : m.inner;
        wide_width = joined > 2 * m.inner ? joined : 2 * m.inner;
        whole_width = padded(inner_width);
        char *at = base;
        auto take = [&](int64_t size) {
            char *here = at;
            at += padded(size);
            return here;
        };
        inner = (float *)take(4 * tokens * inner_width);
        wide = (float *)take(4 * tokens * wide_width);
        thin = (float *)take(4 * tokens * rank);
        scale = (float *)take(4 * tokens);
        whole = (uint8_t *)take(tokens * whole_width);
        bytes = at - base;
    }
};

struct Job {
    const Model &model;
    const Batch &batch;
    int64_t rank;
    Team team;

    void work();
    void product(const Space &s, const Linear &w, int place, float *y, int64_t y_width, bool adds,
                 int64_t layer);
};

// A layer's product of space.inner, and each adapter's share.
void Job::product(const Space &s, const Linear &w, int place, float *y, int64_t y_width, bool adds,
                  int64_t layer) {
    const Rows rows{s.inner, s.inner_width, s.whole, s.whole_width, s.scale};
    multiply(team, w, model.zero, rows, batch.tokens, y, y_width, adds);
    for (int64_t g = 0; g < batch.group_count; g++) {
        const Group &group = batch.groups[g];
        const Thin &thin = group.thin[4 * layer + place];
        const int64_t count = group.end - group.begin;
        float *own = y + group.begin * y_width;
        if (thin.down.outputs) {
            multiply(team, thin.down, 0, rows.from(group.begin), count, s.thin, thin.down.outputs, false);
            const Rows narrow{s.thin, thin.down.outputs, nullptr, 0, nullptr};
            multiply(team, thin.up, 0, narrow, count, own, y_width, true);
        }
        if (thin.bias)
            team.share(count, 1, [&](int64_t row) {
                for (int64_t i = 0; i < w.outputs; i++) own[row * y_width + i] += thin.bias[i];
            });
    }
}

void Job::work() {
    const Model &m = model;
    const Batch &b = batch;
    const Space s(m, b.tokens, rank, b.scratch);
    const int64_t size = m.head_dim, attended = m.heads * size;
    const float scale = 1.0f / __builtin_sqrtf(float(size));
    auto rounded = [&](const Linear &w, int64_t row) {
        if (w.scale)
            round_row(s.inner + row * s.inner_width, w.inputs, m.levels, m.zero, s.whole + row * s.whole_width,
                      s.scale + row);
    };
    for (int64_t l = 0; l < m.layer_count; l++) {
        const Layer &layer = m.layers[l];
        team.share(b.tokens, 1, [&](int64_t t) {
            scale_row(b.x + t * m.hidden, m.hidden, layer.mixer_norm, m.eps, s.inner + t * s.inner_width);
            rounded(layer.inputs, t);
        });
        product(s, layer.inputs, 0, s.wide, s.wide_width, false, l);
        // Each token's queries and keys turned, keys and values written.
        team.share(b.tokens, 1, [&](int64_t t) {
            int64_t at = t;
            const Segment *segment = b.segments;
            for (; at >= segment->count; segment++) at -= segment->count;
            const int64_t position = segment->start + at, half = m.rotary / 2;
            float *heads = s.wide + t * s.wide_width, *kv = segment->kv + l * segment->stride;
            for (int64_t h = 0; h < m.heads + m.kv_heads; h++) {
                float *head = heads + h * size;
                if (layer.heads_norm) scale_row(head, size, layer.heads_norm + h * size, m.eps, head);
                turn_head(head, half, b.cos + position * half, b.sin + position * half);
            }
            for (int64_t h = 0; h < 2 * m.kv_heads; h++)
                std::memcpy(kv + (h * segment->capacity + position) * size, heads + attended + h * size, 4 * size);
        });
        // A few neighbouring tokens of a row, one head.
        int64_t blocks = 0;
        for (int64_t i = 0; i < b.segment_count; i++) blocks += (b.segments[i].count + QUERIES - 1) / QUERIES;
        team.share(blocks * m.heads, 1, [&](int64_t piece) {
            int64_t block = piece / m.heads, token = 0;
            const int64_t h = piece % m.heads;
            const Segment *segment = b.segments;
            for (;; segment++) {
                const int64_t own = (segment->count + QUERIES - 1) / QUERIES;
                if (block < own) break;
                block -= own, token += segment->count;
            }
            const int64_t kv_head = h / (m.heads / m.kv_heads), begin = block * QUERIES;
            const float *kv = segment->kv + l * segment->stride;
            Query queries[QUERIES];
            int count = 0;
            for (int64_t i = begin; i < segment->count && count < QUERIES; i++, count++) {
                const int64_t end = segment->start + i + 1;
                queries[count] = {s.wide + (token + i) * s.wide_width + h * size,
                                  s.inner + (token + i) * s.inner_width + h * size,
                                  layer.window && end > layer.window ? end - layer.window : 0, end};
            }
            attend(queries, count, kv + kv_head * segment->capacity * size,
                   kv + (m.kv_heads + kv_head) * segment->capacity * size, int(size), scale);
        });
        if (layer.output.scale) team.share(b.tokens, 1, [&](int64_t t) { rounded(layer.output, t); });
        product(s, layer.output, 1, b.x, m.hidden, true, l);
        team.share(b.tokens, 1, [&](int64_t t) {
            scale_row(b.x + t * m.hidden, m.hidden, layer.feed_norm, m.eps, s.inner + t * s.inner_width);
            rounded(layer.gate_up, t);
        });
        product(s, layer.gate_up, 2, s.wide, s.wide_width, false, l);
        team.share(b.tokens, 1, [&](int64_t t) {
            const float *gate = s.wide + t * s.wide_width;
            gate_row(gate, gate + m.inner, m.inner, s.inner + t * s.inner_width);
            rounded(layer.down, t);
        });
        product(s, layer.down, 3, b.x, m.hidden, true, l);
    }
    if (!b.wanted_count) return;
    team.share(b.wanted_count, 1, [&](int64_t t) {
        float *last = b.last + t * m.hidden;
        scale_row(b.x + b.wanted[t] * m.hidden, m.hidden, m.norm, m.eps, last);
        if (m.head.scale)
            round_row(last, m.hidden, m.levels, m.zero, s.whole + t * s.whole_width, s.scale + t);
    });
    const Rows rows{b.last, m.hidden, s.whole, s.whole_width, s.scale};
    multiply(team, m.head, m.zero, rows, b.wanted_count, b.logits, m.vocabulary, false);
}

// Every thread of a team comes here once; with an OpenMP runtime, which may send fewer than were asked for, the first
// to come tells how many there are.
struct Entry {
    void (*run)(void *);
    void *job;
    Team *team;
    int (*count)();
    std::atomic<int> known{0};
};

void enter(void *data) {
    Entry &entry = *(Entry *)data;
    if (entry.count) {
        if (entry.team->tickets.fetch_add(1) == 0) {
            entry.team->count = entry.count();
            entry.known.store(1, std::memory_order_release);
        }
        while (!entry.known.load(std::memory_order_acquire)) breathe();
    }
    entry.run(entry.job);
}

void in_threads(const Runtime *runtime, int threads, Team &team, void (*run)(void *), void *job) {
    const bool shares = runtime && runtime->parallel;
    Entry entry{run, job, &team, shares ? runtime->count : nullptr};
    team.count = threads;
    if (threads == 1)
        run(job);
    else if (shares)
        runtime->parallel(enter, &entry, unsigned(threads), 0);
    else
        Pool::get().run(threads, enter, &entry);
}

struct Alone {
    const Linear &w;
    int32_t levels, zero;
    const float *x;
    int64_t rows;
    float *y;
    uint8_t *whole;
    float *scale;
    Team team;
};

} // namespace

extern "C" {

int64_t native_panel() { return PANEL; }

const char *native_instructions() {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return "AVX-512 with VNNI";
#elif defined(__AVX512F__) && defined(__AVX512BW__)
    return "AVX-512";
#elif defined(__AVX2__) && defined(__FMA__)
    return "AVX2";
#else
    return "no vector instructions";
#endif
}

// weight (outputs, inputs) -> panels; what is beyond the last output is 0.
void native_pack_int8(const int8_t *weight, int64_t outputs, int64_t inputs, int8_t *packed, int32_t *sums) {
    const int64_t fours = (inputs + 3) / 4, panels = (outputs + PANEL - 1) / PANEL;
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t lane = 0; lane < PANEL; lane++) {
            const int64_t output = panel * PANEL + lane;
            int8_t *to = packed + panel * PANEL * fours * 4 + lane * 4;
            int32_t sum = 0;
            for (int64_t i = 0; i < 4 * fours; i++) {
                const int8_t one = output < outputs && i < inputs ? weight[output * inputs + i] : int8_t(0);
                sum += one;
                to[i / 4 * PANEL * 4 + i % 4] = one;
            }
            sums[output] = sum;
        }
}

void native_pack_float(const float *weight, int64_t outputs, int64_t inputs, float *packed) {
    const int64_t panels = (outputs + PANEL - 1) / PANEL;
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t i = 0; i < inputs; i++)
            for (int64_t lane = 0; lane < PANEL; lane++) {
                const int64_t output = panel * PANEL + lane;
                packed[(panel * inputs + i) * PANEL + lane] = output < outputs ? weight[output * inputs + i] : 0.0f;
            }
}

// y (rows, outputs) = x (rows, inputs) W^T + bias. whole (rows, inputs rounded up to 64) and scale (rows): room for int8.
void native_linear(const Linear *w, int32_t levels, int32_t zero, const float *x, int64_t rows, float *y,
                   uint8_t *whole, float *scale, int32_t threads, const Runtime *runtime) {
    Alone alone{*w, levels, zero, x, rows, y, whole, scale, {}};
    in_threads(
        runtime, threads, alone.team,
        [](void *data) {
            Alone &a = *(Alone *)data;
            const int64_t width = padded(a.w.inputs);
            if (a.w.scale)
                a.team.share(a.rows, 1, [&](int64_t row) {
                    round_row(a.x + row * a.w.inputs, a.w.inputs, a.levels, a.zero, a.whole + row * width,
                              a.scale + row);
                });
            const Rows from{a.x, a.w.inputs, a.whole, width, a.scale};
            multiply(a.team, a.w, a.zero, from, a.rows, a.y, a.w.outputs, false);
        },
        &alone);
}

// Bytes that a step of so many tokens works in; rank: the largest of its adapters, 0 without.
int64_t native_scratch(const Model *model, int64_t tokens, int64_t rank) {
    return Space(*model, tokens, rank, nullptr).bytes;
}

void native_step(const Model *model, const Batch *batch, int64_t rank, int32_t threads, const Runtime *runtime) {
    Job job{*model, *batch, rank, {}};
    in_threads(runtime, threads, job.team, [](void *data) { ((Job *)data)->work(); }, &job);
}
}
