// One step of a dense decoder on a CPU: every layer and the head, for any tokens of any rows, in one parallel region.
//
// In: pointers to packed weights, to rows' keys and values, token ids. Out: keys and values written, logits.
//
// Every sum has an order that depends on its own length and position alone: a number is computed by one thread, in
// one chain, whatever other rows there are, however a prompt was cut, and however many threads there are. Products of
// whole numbers are exact in any order. No multiplication and addition are fused but where `fma` says so
// (-ffp-contract=off), so that the same row gets the same bits from each copy that the compiler makes of a loop.
//
// A weight lies in panels of PANEL outputs: for floats [inputs][PANEL], for int8 [inputs / 4][PANEL][4]. int4 is made of
// groups of inputs: scales and zeros, both bfloat16, of an output and of the one W further in the halves of 32 bits, then
// [group / 8][PANEL][4] bytes, whose lower halves are the first four of eight inputs.

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int W = 16;
constexpr int TILE_ROWS = 12;
constexpr int GROUP_ROWS = 8;
constexpr int BLOCKS = 4; // vectors of keys, or of values, at once
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int W = 8;
constexpr int TILE_ROWS = 6;
constexpr int GROUP_ROWS = 2;
constexpr int BLOCKS = 2;
#else
constexpr int W = 4;
constexpr int TILE_ROWS = 4;
constexpr int GROUP_ROWS = 2;
constexpr int BLOCKS = 2;
#endif
constexpr int PANEL = 2 * W;
constexpr int AHEAD = 6144;      // bytes of a weight that are on their way from memory
constexpr int SMALLEST_GROUP = 32; // inputs of int4 that share a scale
constexpr int KEYS = 64;          // keys that are scored before the running maximum moves
constexpr int RANGE = 512;        // keys that are summed by themselves: threads share a long row's ranges
constexpr int QUERIES = 8;        // tokens whose queries go over one tile of keys together
constexpr int TOGETHER = 4;          // heads whose queries share what is loaded of keys and values
constexpr int HEAD_LIMIT = 256;   // numbers of a head
constexpr int ALONE = 8;          // tokens of a step up to which threads share the ranges of one row
constexpr int64_t ROW_BLOCK = 48; // rows that one thread multiplies with a panel at a time

typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Whole __attribute__((vector_size(4 * W)));
typedef uint8_t Bytes __attribute__((vector_size(W)));
typedef uint8_t Quarters __attribute__((vector_size(4 * W)));

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

// sum += products of four bytes each: a signed, the same four for every output; q unsigned, below 16
inline Whole dot4_small(Whole sum, Quarters q, const int8_t *a) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    int32_t four;
    std::memcpy(&four, a, 4);
    const __m512i right = _mm512_set1_epi32(four);
#if defined(__AVX512VNNI__)
    return (Whole)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)q, right);
#else
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)q, right);
    return (Whole)_mm512_add_epi32((__m512i)sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
#elif defined(__AVX2__) && defined(__FMA__)
    int32_t four;
    std::memcpy(&four, a, 4);
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)q, _mm256_set1_epi32(four));
    return (Whole)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
    for (int lane = 0; lane < W; lane++)
        for (int i = 0; i < 4; i++) sum[lane] += int32_t(q[4 * lane + i]) * int32_t(a[i]);
    return sum;
#endif
}

inline Floats to_floats(Whole v) { return __builtin_convertvector(v, Floats); }
inline Quarters upper(Quarters v) { return (Quarters)(((Whole)v >> 4) & 0x0f0f0f0f); }
// bfloat16 in the halves of 32 bits
inline Floats lower_half(Whole v) { return (Floats)(v << 16); }
inline Floats upper_half(Whole v) { return (Floats)(v & int32_t(0xffff0000)); }
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
    const float *scale;   // int8: of each output; else null
    const int32_t *sums;  // int8: of each output's weights
    const float *bias;    // or null
    int64_t group;        // int4: inputs that share a scale, a multiple of 32; else 0

    bool is_whole() const { return scale || group; }
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
// 0, keys in blocks of W positions, (head size, W); the next layer's is `stride` numbers further.
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

// The threads that work on one step, section by section. A section is over when its pieces are done, not when every
// thread has come: one that the system has put aside finds later how far the others are, and holds up only what it had
// taken.
struct Team {
    alignas(64) std::atomic<int64_t> next{0}; // the section, times 2^32, and its piece that nobody has taken
    alignas(64) std::atomic<int64_t> done{0}; // its pieces that are done
    std::atomic<int> tickets{0}, left{0}, sleepers{0};
    std::mutex mutex;
    std::condition_variable woken;
    int count = 1;

    // Return when `over` tells true. Who waits long sleeps: its processor may run the thread that it waits for.
    template <class Over> void wait(Over over) {
        for (int spins = 0; spins < 4000; spins++) {
            if (over()) return;
            breathe();
        }
        std::unique_lock<std::mutex> held(mutex);
        sleepers.fetch_add(1);
        woken.wait(held, over);
        sleepers.fetch_sub(1);
    }
    void wake() {
        if (!sleepers.load()) return;
        std::lock_guard<std::mutex> held(mutex);
        woken.notify_all();
    }
    // The end of a thread's work: returns when all have come here, for what they read lies in the caller's frame.
    void leave() {
        if (left.fetch_add(1) + 1 == count) return wake();
        wait([this] { return left.load() == count; });
    }
};

// One thread's way through the sections.
struct Worker {
    Team &team;
    int64_t section = 0;

    // Run piece(i) for each i < pieces, `grain` neighbours a thread at a time; returns when all are done.
    template <class Piece> void share(int64_t pieces, int64_t grain, Piece piece) {
        if (pieces == 0) return;
        if (team.count == 1) {
            for (int64_t i = 0; i < pieces; i++) piece(i);
            return;
        }
        const int64_t own = section++;
        int64_t now = team.next.load(std::memory_order_acquire);
        while (now >> 32 == own && (now & 0xffffffff) < pieces) {
            if (!team.next.compare_exchange_weak(now, now + grain, std::memory_order_acq_rel)) continue;
            const int64_t first = now & 0xffffffff, end = first + grain < pieces ? first + grain : pieces;
            for (int64_t i = first; i < end; i++) piece(i);
            if (team.done.fetch_add(end - first, std::memory_order_acq_rel) + end - first == pieces) {
                team.done.store(0, std::memory_order_relaxed);
                team.next.store((own + 1) << 32);
                return team.wake();
            }
            now = team.next.load(std::memory_order_acquire);
        }
        team.wait([&] { return team.next.load() >> 32 != own; });
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

// What whole numbers of a row, or of a group of it, stand for: step times each; of a group also step times their sum, and
// -8 times it.
struct Scale {
    float step, shift;
    int32_t start;
};

// The rows of a product's input: floats, and where the weight is int8 or int4 their whole numbers and scales.
struct Rows {
    const float *x;
    int64_t width; // numbers from a row to the next
    const uint8_t *whole;
    int64_t whole_width;
    const Scale *scale;
    int64_t scale_width;
    Rows from(int64_t row) const {
        return {x + row * width, width, whole + row * whole_width, whole_width, scale + row * scale_width, scale_width};
    }
};

// Ask for the part of a weight that is read AHEAD bytes later; N: numbers of 4 bytes that one round reads.
template <int N> inline void ask_ahead(const void *weight) {
#pragma GCC unroll 2
    for (int line = 0; line < 4 * N; line += 64) __builtin_prefetch((const char *)weight + AHEAD + line);
}

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
        ask_ahead<2 * W>(weight);
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
        ask_ahead<2 * W>(weight);
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
        Floats a = to_floats(low[m] - zero * sums_low) * scale_low * splat(rows.scale[m * rows.scale_width].step);
        Floats b = to_floats(high[m] - zero * sums_high) * scale_high * splat(rows.scale[m * rows.scale_width].step);
        if (w.bias) a = a + bias_low, b = b + bias_high;
        finish(a, b, w.outputs - first, y + m * width + first, adds);
    }
}

template <int M>
void multiply_groups(const Linear &w, int64_t panel, const Rows &rows, float *y, int64_t width, bool adds) {
    const int64_t groups = w.inputs / w.group;
    const uint8_t *weight = (const uint8_t *)w.weight + panel * groups * (4 + w.group / 2) * PANEL;
    const int64_t first = panel * PANEL;
    Floats low[M], high[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
        low[m] = w.bias ? load(w.bias + first) : Floats{};
        high[m] = w.bias ? load(w.bias + first + W) : Floats{};
    }
    const int8_t *x = (const int8_t *)rows.whole;
    for (int64_t g = 0; g < groups; g++) {
        Whole scales, zeros, some[M], more[M];
        std::memcpy(&scales, weight, sizeof scales), std::memcpy(&zeros, weight + 4 * W, sizeof zeros);
        weight += 8 * W;
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) some[m] = more[m] = Whole{} + rows.scale[m * rows.scale_width + g].start;
        for (int64_t k = 0; k < w.group; k += 8, weight += 8 * W, x += 8) {
            ask_ahead<2 * W>(weight);
            Quarters a, b;
            std::memcpy(&a, weight, sizeof a), std::memcpy(&b, weight + 4 * W, sizeof b);
            const Quarters a_first = a & 15, b_first = b & 15, a_last = upper(a), b_last = upper(b);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                const int8_t *own = x + m * rows.whole_width;
                some[m] = dot4_small(some[m], a_first, own), more[m] = dot4_small(more[m], b_first, own);
                some[m] = dot4_small(some[m], a_last, own + 4), more[m] = dot4_small(more[m], b_last, own + 4);
            }
        }
        const Floats scale_low = lower_half(scales), scale_high = upper_half(scales);
        const Floats zero_low = lower_half(zeros), zero_high = upper_half(zeros);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const Scale &own = rows.scale[m * rows.scale_width + g];
            low[m] = fma(to_floats(some[m]) * splat(own.step), scale_low, low[m]);
            high[m] = fma(to_floats(more[m]) * splat(own.step), scale_high, high[m]);
            low[m] = fma(splat(own.shift), zero_low, low[m]), high[m] = fma(splat(own.shift), zero_high, high[m]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) finish(low[m], high[m], w.outputs - first, y + m * width + first, adds);
}

template <int M>
void multiply_rows(int64_t rows, const Linear &w, int32_t zero, int64_t panel, const Rows &x, float *y, int64_t width,
                   bool adds) {
    if (rows == M) {
        if constexpr (M <= GROUP_ROWS)
            if (w.group) return multiply_groups<M>(w, panel, x, y, width, adds);
        if (w.scale)
            multiply_whole<M>(w, zero, panel, x, y, width, adds);
        else
            multiply_floats<M>(w, panel, x, y, width, adds);
        return;
    }
    if constexpr (M > 1) multiply_rows<M - 1>(rows, w, zero, panel, x, y, width, adds);
}

// y (rows, width) = or += the product of all rows.
void multiply(Worker &worker, const Linear &w, int32_t zero, const Rows &x, int64_t rows, float *y, int64_t width,
              bool adds) {
    const int64_t panels = (w.outputs + PANEL - 1) / PANEL, blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
    const int64_t grain = panels / (16 * worker.team.count) > 1 ? panels / (16 * worker.team.count) : 1;
    worker.share(panels * blocks, grain < 8 ? grain : 8, [&](int64_t piece) {
        const int64_t panel = piece / blocks, begin = piece % blocks * ROW_BLOCK;
        const int64_t end = begin + ROW_BLOCK < rows ? begin + ROW_BLOCK : rows;
        const int64_t most = w.group ? GROUP_ROWS : TILE_ROWS;
        for (int64_t row = begin; row < end; row += most) {
            const int64_t count = end - row < most ? end - row : most;
            multiply_rows<TILE_ROWS>(count, w, zero, panel, x.from(row), y + row * width, width, adds);
        }
    });
}

// Rounded to whole numbers between zero - levels and zero + levels. x has `width` numbers, a multiple of 4 W or not.
void round_row(const float *x, int64_t width, int32_t levels, int32_t zero, uint8_t *whole, Scale *scale) {
    Floats most{};
    int64_t i = 0;
    for (; i + W <= width; i += W) most = larger(most, magnitude(load(x + i)));
    float top = largest_of(most);
    for (; i < width; i++) {
        const float one = x[i] < 0 ? -x[i] : x[i];
        top = top > one ? top : one;
    }
    const float step = fma(splat(top), splat(float(1.0 / levels)), splat(1e-12f))[0];
    scale->step = step;
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

// Each group rounded to whole numbers between -127 and 127.
void round_groups(const float *x, int64_t width, int64_t group, int8_t *whole, Scale *scale) {
    for (int64_t begin = 0; begin < width; begin += group, scale++) {
        Floats most{};
        for (int64_t i = 0; i < group; i += W) most = larger(most, magnitude(load(x + begin + i)));
        const float step = fma(splat(largest_of(most)), splat(1.0f / 127), splat(1e-12f))[0];
        Whole sum{};
        for (int64_t i = 0; i < group; i += W) {
            const Floats magic = splat(12582912.0f);
            const Whole found = (Whole)(load(x + begin + i) / splat(step) + magic) - (Whole)magic;
            sum += found;
            const Bytes bytes = __builtin_convertvector(found, Bytes);
            std::memcpy(whole + begin + i, &bytes, W);
        }
        int32_t total = 0;
        for (int i = 0; i < W; i++) total += sum[i];
        *scale = {step, step * float(total), -8 * total};
    }
}

// What a product with `w` takes of a row.
void round_for(const Linear &w, const float *x, int32_t levels, int32_t zero, uint8_t *whole, Scale *scale) {
    if (w.group)
        round_groups(x, w.inputs, w.group, (int8_t *)whole, scale);
    else if (w.scale)
        round_row(x, w.inputs, levels, zero, whole, scale);
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

// The queries of up to TOGETHER heads over some keys: each one's largest score, its weights' sums, its weighted values.
struct Sums {
    float most[TOGETHER];
    Floats total[TOGETHER];
    alignas(64) float found[TOGETHER][HEAD_LIMIT];

    void clear(int heads, int size) {
        for (int h = 0; h < heads; h++) {
            most[h] = -__builtin_inff(), total[h] = Floats{};
            std::memset(found[h], 0, 4 * size);
        }
    }
    // Weigh what was found so far by 2^-something: a larger score has come.
    void shrink(int h, int size, float now) {
        const Floats by = splat(exponential(splat(most[h] - now))[0]);
        for (int d = 0; d < size; d += W) store(found[h] + d, load(found[h] + d) * by);
        total[h] = total[h] * by;
        most[h] = now;
    }
    // Add what was found of later keys, which is changed.
    void add(Sums &later, int heads, int size) {
        for (int h = 0; h < heads; h++) {
            if (later.most[h] == -__builtin_inff()) continue; // none of them
            if (later.most[h] > most[h])
                shrink(h, size, later.most[h]);
            else
                later.shrink(h, size, most[h]);
            for (int d = 0; d < size; d += W) store(found[h] + d, load(found[h] + d) + load(later.found[h] + d));
            total[h] = total[h] + later.total[h];
        }
    }
};

// G heads' queries of one token over its keys [from, to) of one tile. Keys lie in blocks [size][W], values [size].
template <int G>
void attend_tile(const float *q, const float *keys, const float *values, int64_t tile, int64_t from, int64_t to,
                 int size, float scale, Sums &sums) {
    alignas(64) float score[G][KEYS];
    const float *value_end = values + to * size;
    const int64_t blocks = (to - tile + W - 1) / W;
    auto compare = [&](auto parts, int64_t block) {
        constexpr int B = decltype(parts)::value;
        Floats found[G][B];
#pragma GCC unroll 4
        for (int g = 0; g < G; g++)
#pragma GCC unroll 4
            for (int k = 0; k < B; k++) found[g][k] = Floats{};
        const float *key = keys + (tile + block * W) * size, *value = values + (tile + block * W) * size;
        for (int d = 0; d < size; d++) {
#pragma GCC unroll 4
            for (int k = 0; k < B; k++) {
                const Floats right = load(key + (k * size + d) * W);
#pragma GCC unroll 4
                for (int g = 0; g < G; g++) found[g][k] = fma(splat(q[g * size + d]), right, found[g][k]);
            }
            value += B * W; // read next
            if (value < value_end)
#pragma GCC unroll 4
                for (int line = 0; line < B * W; line += 16) __builtin_prefetch(value + line);
        }
#pragma GCC unroll 4
        for (int g = 0; g < G; g++)
#pragma GCC unroll 4
            for (int k = 0; k < B; k++) store(score[g] + (block + k) * W, found[g][k] * splat(scale));
    };
    int64_t block = 0;
    for (; block + BLOCKS <= blocks; block += BLOCKS) compare(std::integral_constant<int, BLOCKS>(), block);
    for (; block < blocks; block++) compare(std::integral_constant<int, 1>(), block);
    for (int g = 0; g < G; g++) {
        for (int64_t k = 0; k < from - tile; k++) score[g][k] = -__builtin_inff();
        for (int64_t k = to - tile; k < KEYS; k++) score[g][k] = -__builtin_inff();
        Floats top = splat(-__builtin_inff());
        for (int k = 0; k < KEYS; k += W) top = larger(load(score[g] + k), top);
        const float now = largest_of(top);
        if (now > sums.most[g]) sums.shrink(g, size, now);
        for (int k = 0; k < KEYS; k += W) {
            const Floats s = load(score[g] + k), p = exponential(s - splat(sums.most[g]));
            const Floats seen = s == splat(-__builtin_inff()) ? Floats{} : p;
            store(score[g] + k, seen);
            sums.total[g] = sums.total[g] + seen;
        }
    }
    auto weigh = [&](auto parts, int d) {
        constexpr int V = decltype(parts)::value;
        Floats found[G][V];
#pragma GCC unroll 4
        for (int g = 0; g < G; g++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) found[g][v] = load(sums.found[g] + d + v * W);
        for (int64_t k = from; k < to; k++) {
            const float *value = values + k * size + d;
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) {
                const Floats right = load(value + v * W);
#pragma GCC unroll 4
                for (int g = 0; g < G; g++) found[g][v] = fma(splat(score[g][k - tile]), right, found[g][v]);
            }
        }
#pragma GCC unroll 4
        for (int g = 0; g < G; g++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) store(sums.found[g] + d + v * W, found[g][v]);
    };
    int d = 0;
    for (; d + BLOCKS * W <= size; d += BLOCKS * W) weigh(std::integral_constant<int, BLOCKS>(), d);
    for (; d < size; d += W) weigh(std::integral_constant<int, 1>(), d);
}

// The queries of neighbouring tokens of a row: `heads` of one key-value head each, from position `first` on.
struct Queries {
    const float *q;
    float *y;
    int64_t width;         // numbers from a token's queries and results to the next token's: q's, y's
    int64_t y_width;
    int64_t first, window; // of keys; 0: all
    int count, heads, size;
    const float *keys, *values;
    float scale;

    int64_t from(int i) const { return window && first + i + 1 > window ? first + i + 1 - window : 0; }

    // One range of keys.
    void attend(int64_t range, Sums *sums) const {
        for (int i = 0; i < count; i++) sums[i].clear(heads, size);
        for (int64_t tile = range * RANGE; tile < (range + 1) * RANGE && tile < first + count; tile += KEYS)
            for (int i = 0; i < count; i++) {
                const int64_t begin = from(i) > tile ? from(i) : tile;
                const int64_t end = first + i + 1 < tile + KEYS ? first + i + 1 : tile + KEYS;
                if (begin >= end) continue;
                auto run = heads == 1 ? attend_tile<1> : heads == 2 ? attend_tile<2> : heads == 3 ? attend_tile<3> : attend_tile<4>;
                run(q + i * width, keys, values, tile, begin, end, size, scale, sums[i]);
            }
    }
    // Token i's result.
    void finish(int i, const Sums &sums) const {
        for (int h = 0; h < heads; h++) {
            const Floats by = splat(sum_of(sums.total[h]));
            for (int d = 0; d < size; d += W)
                store(y + i * y_width + h * size + d, load(sums.found[h] + d) / by);
        }
    }
};

inline int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The numbers that a step works on, in one piece of memory.
struct Space {
    float *inner, *wide, *thin;
    Scale *scale;
    uint8_t *whole;
    Sums *sums; // (tokens, sets, ranges), where threads share a row's ranges
    int64_t inner_width, wide_width, whole_width, scale_width, sets, ranges, bytes;

    // rank: the largest of the adapters; reach: the longest row's length.
    Space(const Model &m, int64_t tokens, int64_t rank, int64_t reach, char *base) {
        const int64_t attended = m.heads * m.head_dim, joined = (m.heads + 2 * m.kv_heads) * m.head_dim;
        inner_width = m.hidden > attended ? m.hidden : attended;
        inner_width = inner_width > m.inner ? inner_width : m.inner;
        wide_width = joined > 2 * m.inner ? joined : 2 * m.inner;
        whole_width = padded(inner_width);
        scale_width = inner_width / SMALLEST_GROUP;
        sets = m.kv_heads * ((m.heads / m.kv_heads + TOGETHER - 1) / TOGETHER);
        ranges = tokens <= ALONE ? (reach + RANGE - 1) / RANGE : 1;
        char *at = (char *)padded((intptr_t)base);
        auto take = [&](int64_t size) {
            char *here = at;
            at += padded(size);
            return here;
        };
        inner = (float *)take(4 * tokens * inner_width);
        wide = (float *)take(4 * tokens * wide_width);
        thin = (float *)take(4 * tokens * rank);
        scale = (Scale *)take(tokens * scale_width * sizeof(Scale));
        whole = (uint8_t *)take(tokens * whole_width);
        sums = (Sums *)take(ranges > 1 ? tokens * sets * ranges * sizeof(Sums) : 0);
        bytes = at - base + 64;
    }
};

struct Job {
    const Model &model;
    const Batch &batch;
    Space space;
    Team team;

    void work();
    void product(Worker &worker, const Linear &w, int place, float *y, int64_t y_width, bool adds, int64_t layer);
    void attend(Worker &worker, const Layer &layer, int64_t l);
    Queries queries(const Segment &segment, int64_t l, int64_t token, int64_t begin, int64_t count, int64_t set,
                    int64_t window);
};

// A layer's product of space.inner, and each adapter's share.
void Job::product(Worker &worker, const Linear &w, int place, float *y, int64_t y_width, bool adds, int64_t layer) {
    const Space &s = space;
    const Rows rows{s.inner, s.inner_width, s.whole, s.whole_width, s.scale, s.scale_width};
    multiply(worker, w, model.zero, rows, batch.tokens, y, y_width, adds);
    for (int64_t g = 0; g < batch.group_count; g++) {
        const Group &group = batch.groups[g];
        const Thin &thin = group.thin[4 * layer + place];
        const int64_t count = group.end - group.begin;
        float *own = y + group.begin * y_width;
        if (thin.down.outputs) {
            multiply(worker, thin.down, 0, rows.from(group.begin), count, s.thin, thin.down.outputs, false);
            const Rows narrow{s.thin, thin.down.outputs, nullptr, 0, nullptr, 0};
            multiply(worker, thin.up, 0, narrow, count, own, y_width, true);
        }
        if (thin.bias)
            worker.share(count, 1, [&](int64_t row) {
                for (int64_t i = 0; i < w.outputs; i++) own[row * y_width + i] += thin.bias[i];
            });
    }
}

// Of `count` tokens of a segment from its `begin`th on, which is the step's `token`th: a set of heads that share keys.
Queries Job::queries(const Segment &segment, int64_t l, int64_t token, int64_t begin, int64_t count, int64_t set,
                     int64_t window) {
    const Space &s = space;
    const int64_t group = model.heads / model.kv_heads, own = s.sets / model.kv_heads, size = model.head_dim;
    const int64_t kv_head = set / own, skipped = set % own * TOGETHER, head = kv_head * group + skipped;
    const float *kv = segment.kv + l * segment.stride;
    return {s.wide + token * s.wide_width + head * size,
            s.inner + token * s.inner_width + head * size,
            s.wide_width,
            s.inner_width,
            segment.start + begin,
            window,
            int(count),
            int(group - skipped < TOGETHER ? group - skipped : TOGETHER),
            int(size),
            kv + kv_head * segment.capacity * size,
            kv + (model.kv_heads + kv_head) * segment.capacity * size,
            1.0f / __builtin_sqrtf(float(size))};
}

// Attention into space.inner. A token's ranges of keys are summed each by itself and added in order, whether one thread
// does all of them or each does some.
void Job::attend(Worker &worker, const Layer &layer, int64_t l) {
    const Space &s = space;
    const Batch &b = batch;
    const int64_t each = s.ranges > 1 ? 1 : QUERIES;
    int64_t blocks = 0;
    for (int64_t i = 0; i < b.segment_count; i++) blocks += (b.segments[i].count + each - 1) / each;
    worker.share(blocks * s.sets * s.ranges, 1, [&](int64_t piece) {
        const int64_t range = piece % s.ranges, set = piece / s.ranges % s.sets;
        int64_t block = piece / s.ranges / s.sets, token = 0;
        const Segment *segment = b.segments;
        for (;; segment++) {
            const int64_t own = (segment->count + each - 1) / each;
            if (block < own) break;
            block -= own, token += segment->count;
        }
        const int64_t begin = block * each, left = segment->count - begin;
        const Queries q = queries(*segment, l, token + begin, begin, left < each ? left : each, set, layer.window);
        if (s.ranges > 1) return q.attend(range, s.sums + ((token + begin) * s.sets + set) * s.ranges + range);
        Sums part[QUERIES], sums[QUERIES];
        for (int i = 0; i < q.count; i++) sums[i].clear(q.heads, q.size);
        for (int64_t r = q.from(0) / RANGE; r * RANGE < q.first + q.count; r++) {
            q.attend(r, part);
            for (int i = 0; i < q.count; i++) sums[i].add(part[i], q.heads, q.size);
        }
        for (int i = 0; i < q.count; i++) q.finish(i, sums[i]);
    });
    if (s.ranges == 1) return;
    worker.share(b.tokens * s.sets, 1, [&](int64_t piece) {
        int64_t at = piece / s.sets;
        const Segment *segment = b.segments;
        for (; at >= segment->count; segment++) at -= segment->count;
        const Queries q = queries(*segment, l, piece / s.sets, at, 1, piece % s.sets, layer.window);
        Sums sums;
        sums.clear(q.heads, q.size);
        for (int64_t r = 0; r < s.ranges; r++) sums.add(s.sums[piece * s.ranges + r], q.heads, q.size);
        q.finish(0, sums);
    });
}

void Job::work() {
    const Model &m = model;
    const Batch &b = batch;
    const Space &s = space;
    const int64_t size = m.head_dim, attended = m.heads * size;
    Worker worker{team};
    auto rounded = [&](const Linear &w, int64_t row) {
        round_for(w, s.inner + row * s.inner_width, m.levels, m.zero, s.whole + row * s.whole_width,
                  s.scale + row * s.scale_width);
    };
    for (int64_t l = 0; l < m.layer_count; l++) {
        const Layer &layer = m.layers[l];
        worker.share(b.tokens, 1, [&](int64_t t) {
            scale_row(b.x + t * m.hidden, m.hidden, layer.mixer_norm, m.eps, s.inner + t * s.inner_width);
            rounded(layer.inputs, t);
        });
        product(worker, layer.inputs, 0, s.wide, s.wide_width, false, l);
        // Each token's queries and keys turned, keys and values written.
        worker.share(b.tokens, 1, [&](int64_t t) {
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
            const float *keys = heads + attended, *values = keys + m.kv_heads * size;
            for (int64_t h = 0; h < m.kv_heads; h++) { // keys in blocks [size][W]
                float *key = kv + h * segment->capacity * size + position / W * W * size + position % W;
                for (int64_t d = 0; d < size; d++) key[d * W] = keys[h * size + d];
                std::memcpy(kv + ((m.kv_heads + h) * segment->capacity + position) * size, values + h * size, 4 * size);
            }
        });
        attend(worker, layer, l);
        if (layer.output.is_whole()) worker.share(b.tokens, 1, [&](int64_t t) { rounded(layer.output, t); });
        product(worker, layer.output, 1, b.x, m.hidden, true, l);
        worker.share(b.tokens, 1, [&](int64_t t) {
            scale_row(b.x + t * m.hidden, m.hidden, layer.feed_norm, m.eps, s.inner + t * s.inner_width);
            rounded(layer.gate_up, t);
        });
        product(worker, layer.gate_up, 2, s.wide, s.wide_width, false, l);
        worker.share(b.tokens, 1, [&](int64_t t) {
            const float *gate = s.wide + t * s.wide_width;
            gate_row(gate, gate + m.inner, m.inner, s.inner + t * s.inner_width);
            rounded(layer.down, t);
        });
        product(worker, layer.down, 3, b.x, m.hidden, true, l);
    }
    if (!b.wanted_count) return;
    worker.share(b.wanted_count, 1, [&](int64_t t) {
        float *last = b.last + t * m.hidden;
        scale_row(b.x + b.wanted[t] * m.hidden, m.hidden, m.norm, m.eps, last);
        round_for(m.head, last, m.levels, m.zero, s.whole + t * s.whole_width, s.scale + t * s.scale_width);
    });
    const Rows rows{b.last, m.hidden, s.whole, s.whole_width, s.scale, s.scale_width};
    multiply(worker, m.head, m.zero, rows, b.wanted_count, b.logits, m.vocabulary, false);
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
    entry.team->leave();
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
    Scale *scale;
    Team team;
};

// A number of a weight as it is stored; bfloat16 is the upper half of a float.
inline float widened(float x) { return x; }
inline float widened(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
// The nearest bfloat16; between two, the even one.
inline uint16_t narrowed(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

const float WHOLE = 12582912.0f; // added, it leaves no fraction: halves go to the even number

// One output's weights in whole numbers, 127 steps of *scale on each side of 0; their sum.
template <class Number> int32_t round_weights(const Number *row, int64_t inputs, int8_t *whole, float *scale) {
    uint32_t most = 0; // of the bits without a sign, which are in the order of the numbers
    for (int64_t i = 0; i < inputs; i++) {
        const float x = widened(row[i]);
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        bits &= 0x7fffffff;
        most = most < bits ? bits : most;
    }
    float largest;
    std::memcpy(&largest, &most, 4);
    const float step = largest / 127.0f < 1e-12f ? 1e-12f : largest / 127.0f;
    int32_t sum = 0;
    for (int64_t i = 0; i < inputs; i++) {
        const int32_t one = int32_t(widened(row[i]) / step + WHOLE - WHOLE);
        whole[i] = int8_t(one);
        sum += one;
    }
    *scale = step;
    return sum;
}

template <class Number>
void pack_int8(const Number *weight, int64_t outputs, int64_t inputs, int8_t *packed, float *scale, int32_t *sums) {
    const int64_t fours = (inputs + 3) / 4, panels = (outputs + PANEL - 1) / PANEL;
    std::vector<int8_t> whole(4 * fours);
    for (int64_t output = 0; output < panels * PANEL; output++) {
        if (output < outputs)
            sums[output] = round_weights(weight + output * inputs, inputs, whole.data(), scale + output);
        else
            scale[output] = 0, sums[output] = 0, std::memset(whole.data(), 0, 4 * fours);
        int8_t *to = packed + (output / PANEL * PANEL * fours + output % PANEL) * 4;
        for (int64_t four = 0; four < fours; four++) std::memcpy(to + 4 * PANEL * four, &whole[4 * four], 4);
    }
}

template <class Number> void pack_float(const Number *weight, int64_t outputs, int64_t inputs, float *packed) {
    const int64_t panels = (outputs + PANEL - 1) / PANEL;
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t i = 0; i < inputs; i++)
            for (int64_t lane = 0; lane < PANEL; lane++) {
                const int64_t output = panel * PANEL + lane;
                const bool is_there = output < outputs;
                packed[(panel * inputs + i) * PANEL + lane] = is_there ? widened(weight[output * inputs + i]) : 0.0f;
            }
}

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

// Ask for large pages for memory that nobody has touched yet: a step reads all weights, and looks up each page.
void native_large_pages(char *at, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr intptr_t PAGE = 1 << 21;
    const intptr_t first = ((intptr_t)at + PAGE - 1) / PAGE * PAGE, end = ((intptr_t)at + bytes) / PAGE * PAGE;
    if (end > first) madvise((void *)first, end - first, MADV_HUGEPAGE);
#endif
}

// weight (outputs, inputs), bfloat16 where `halves`, else float32 -> panels; what is beyond the last output is 0.
void native_pack_int8(const void *weight, int32_t halves, int64_t outputs, int64_t inputs, int8_t *packed, float *scale,
                      int32_t *sums) {
    if (halves)
        pack_int8((const uint16_t *)weight, outputs, inputs, packed, scale, sums);
    else
        pack_int8((const float *)weight, outputs, inputs, packed, scale, sums);
}

// weight (outputs, inputs): 0 to 15, scales (inputs / group, outputs, 2) bfloat16: scale and zero. What is beyond the last
// output is 0.
void native_pack_int4(const int32_t *weight, const uint16_t *scales, int64_t outputs, int64_t inputs, int64_t group,
                      uint8_t *packed) {
    const int64_t panels = (outputs + PANEL - 1) / PANEL;
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t g = 0; g < inputs / group; g++, packed += (4 + group / 2) * PANEL)
            for (int64_t lane = 0; lane < PANEL; lane++) {
                const int64_t output = panel * PANEL + lane;
                for (int i = 0; i < 2; i++) {
                    const uint16_t one = output < outputs ? scales[(g * outputs + output) * 2 + i] : uint16_t(0);
                    std::memcpy(packed + (i * W + lane % W) * 4 + lane / W * 2, &one, 2);
                }
                const int32_t *from = weight + output * inputs + g * group;
                for (int64_t i = 0; i < group; i++) {
                    const uint8_t one = output < outputs ? uint8_t(from[i]) : uint8_t(0);
                    uint8_t &to = packed[4 * PANEL + i / 8 * 4 * PANEL + lane * 4 + i % 4];
                    to = i % 8 < 4 ? one : uint8_t(to | one << 4);
                }
            }
}

void native_pack_float(const void *weight, int32_t halves, int64_t outputs, int64_t inputs, float *packed) {
    if (halves)
        pack_float((const uint16_t *)weight, outputs, inputs, packed);
    else
        pack_float((const float *)weight, outputs, inputs, packed);
}

// y (rows, outputs) = x (rows, inputs) W^T + bias. whole (rows, inputs rounded up to 64) and scale (rows, inputs / 32 + 1,
// 3): room for int8 and int4.
void native_linear(const Linear *w, int32_t levels, int32_t zero, const float *x, int64_t rows, float *y,
                   uint8_t *whole, void *scale, int32_t threads, const Runtime *runtime) {
    Alone alone{*w, levels, zero, x, rows, y, whole, (Scale *)scale, {}};
    in_threads(
        runtime, threads, alone.team,
        [](void *data) {
            Alone &a = *(Alone *)data;
            Worker worker{a.team};
            const int64_t width = padded(a.w.inputs);
            const int64_t scales = a.w.inputs / SMALLEST_GROUP + 1;
            if (a.w.is_whole())
                worker.share(a.rows, 1, [&](int64_t row) {
                    round_for(a.w, a.x + row * a.w.inputs, a.levels, a.zero, a.whole + row * width,
                              a.scale + row * scales);
                });
            const Rows from{a.x, a.w.inputs, a.whole, width, a.scale, scales};
            multiply(worker, a.w, a.zero, from, a.rows, a.y, a.w.outputs, false);
        },
        &alone);
}

// Bytes that a step of so many tokens works in; rank: the largest of its adapters, 0 without; reach: the length of its
// longest row.
int64_t native_scratch(const Model *model, int64_t tokens, int64_t rank, int64_t reach) {
    return Space(*model, tokens, rank, reach, nullptr).bytes;
}

void native_step(const Model *model, const Batch *batch, int64_t rank, int64_t reach, int32_t threads,
                 const Runtime *runtime) {
    Job job{*model, *batch, Space(*model, batch->tokens, rank, reach, batch->scratch), {}};
    in_threads(runtime, threads, job.team, [](void *data) { ((Job *)data)->work(); }, &job);
}
}
