// Kernels with a planted fault each, and sound ones beside them: what the emulation must catch, and must let pass.
#include <cstdio>
#include <string>
#include <vector>

#include "../../../csrc/cuda/support/warpgroup.cuh"

namespace fusednorm_cuda {

using fusednorm_emulation::Machine;

constexpr int kThreads = 64;
static std::vector<float> output(2 * kThreads);

static int thread() { return int(threadIdx.x); }

// Thread t's number goes to its neighbour through shared memory.
static void exchange(bool with_barrier) {
  const Shared<float> shared(0);
  shared.set(thread(), float(thread()));
  if (with_barrier) sync_threads();
  output[thread()] = shared.get((thread() + 1) % kThreads);
}

static void sound() {
  exchange(true);
  float sum = float(thread());
  for (int offset = 16; offset; offset >>= 1) sum += shuffle_xor(sum, offset);
  output[thread()] += sum;
}

static void missing_barrier() { exchange(false); }

static void two_writers() { Shared<int>(0).set(0, thread()); }

static void reused_without_barrier() {
  const Shared<int> shared(0);
  shared.set(thread(), 1);
  sync_threads();
  const int other = shared.get(kThreads - 1 - thread());
  shared.set(thread(), other);  // another thread may not have read it yet
}

static void barriers_at_two_places() {
  if (thread() < 32)
    sync_threads();
  else
    sync_threads();
}

static void barrier_that_some_skip() {
  if (thread() != 5) sync_threads();
}

static void shuffle_that_some_skip() {
  if (thread() != 5) shuffle_xor(1.0f, 1);
}

static void out_of_bounds() {
  const volatile float* past = output.data();
  output[0] = past[output.size() + (thread() == 40)];
}

static void shared_out_of_bounds() { Shared<float>(0).set(thread() + 1, 0.0f); }

static void shared_never_written() { output[thread()] = Shared<float>(0).get(thread()); }

static void misaligned() {
  const auto* at = reinterpret_cast<const char*>(output.data()) + 4;
  output[0] = float(reinterpret_cast<const uint4*>(at)->x);
}

static void cluster_sound() {
  const Shared<int> shared(0);
  sync_cluster();
  shared.send(1 - cluster_rank(), thread(), 10 + cluster_rank(), MBarrier(0));
  sync_cluster();
  output[cluster_rank() * kThreads + thread()] = float(shared.get(thread()));
}

static void cluster_missing_barrier() {
  const Shared<int> shared(0);
  shared.set(thread(), 1);
  sync_threads();  // orders nothing in the other block
  shared.send(1 - cluster_rank(), thread(), 2, MBarrier(0));
}

// Two barriers in turns: what comes for one is counted while threads still look at the other.
static void arrivals_sound() {
  const MBarrier turns[2] = {MBarrier(240), MBarrier(248)};
  if (thread() == 0) turns[0].start(), turns[1].start();
  sync_cluster();
  for (int round = 0; round < 4; ++round) {
    const MBarrier& arrivals = turns[round & 1];
    if (thread() == 0) arrivals.expect(4);
    if (thread() == 7) Shared<int>(0).send(1 - cluster_rank(), round, 10 + cluster_rank(), arrivals);
    arrivals.wait(round & 2);
    output[cluster_rank() * kThreads + thread()] = float(Shared<int>(0).get(round));
  }
}

static void arrivals_that_never_come() {
  const MBarrier arrivals(248);
  if (thread() == 0) arrivals.start(), arrivals.expect(8);
  sync_cluster();
  if (thread() == 7) Shared<int>(0).send(1 - cluster_rank(), 0, 1, arrivals);
  arrivals.wait(false);
}

static void arrivals_of_another_round() {
  const MBarrier arrivals(248);
  if (thread() == 0) arrivals.start(), arrivals.expect(0);
  arrivals.wait(true);
}

// Sixteen bytes a thread on their way to shared memory: its own four numbers.
static std::vector<float> numbers(4 * kThreads, 3.0f);

static void begin(int slot, bool inside = true) {
  Shared<uint4>(0).copy(slot, numbers.data() + 4 * thread(), inside);
  commit_copies();
}

static void copies_sound() {
  if (thread() >= 8) return;  // what shared memory there is takes two turns of eight
  begin(thread());
  begin(thread() + 8, thread() != 3);
  wait_copies<1>();
  const uint32_t first = Shared<uint4>(0).get(thread()).x;
  wait_copies<0>();
  output[thread()] = float(first + Shared<uint4>(0).get(thread() + 8).x);
}

static void copy_read_too_soon() {
  if (thread() >= 8) return;
  begin(thread());
  begin(thread() + 8);
  wait_copies<1>();
  output[thread()] = float(Shared<uint4>(0).get(thread() + 8).x);  // the newer one may still be on its way
}

static void copy_never_waited_for() {
  if (thread() < 8) begin(thread());
}

static void copy_over_a_number_in_use() {
  const Shared<float> shared(0);
  shared.set(thread(), 1.0f);
  if (thread() < 8) begin(thread());
  if (thread() < 8) wait_copies<0>();
}

static void copy_from_anywhere() {
  if (thread() < 8) Shared<uint4>(0).copy(thread(), numbers.data() + 1, true);
  commit_copies();
  wait_copies<0>();
}

// Of matrices: a (16 x 16) by rows, then b (8 x 16) by columns, 16 bytes half a row.
constexpr int kMatrixBytes = (16 + 8) * 32;
static uint4 matrices[kMatrixBytes / 16];

static float number(int i, int k) { return float((3 * i + 5 * k) % 7 - 3); }

// A warp's product of what all threads copy, held to what it should be.
template <bool TRANSPOSED>
static void multiply(bool waits, int lanes, int offset) {
  uint16_t* const numbers_of = reinterpret_cast<uint16_t*>(matrices);
  for (int i = 0; i < 24; ++i)
    for (int k = 0; k < 16; ++k) numbers_of[16 * i + k] = uint16_t(pack(number(i, k), 0, Float16{}));
  const Shared<uint4> shared(0);
  if (thread() < kMatrixBytes / 16) shared.copy(thread(), matrices + thread(), true);
  commit_copies();
  if (waits) wait_copies<0>();
  sync_threads();
  if (thread() >= lanes) return;
  const int lane = thread() % 32;
  uint32_t a[4], b[4];
  load_matrices<false>(shared, lane % 16 * 2 + lane / 16 + offset, a);
  load_matrices<TRANSPOSED>(shared, 32 + lane % 8 * 2 + lane / 8 % 2, b);
  float sum[4] = {0, 0, 0, 0};
  multiply_add(sum, a, b[0], b[1], Float16{});
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;
    float expected = 0;
    for (int k = 0; k < 16; ++k) expected += number(row, k) * number(16 + column, k);
    if (sum[e] != expected) Machine::get().fail("a product is wrong");
  }
  output[thread()] = sum[0];
}

static void matrix_sound() { multiply<false>(true, kThreads, 0); }
static void matrix_transposed() { multiply<true>(true, kThreads, 0); }
static void matrix_read_too_soon() { multiply<false>(false, kThreads, 0); }
static void matrix_that_some_skip() { multiply<false>(true, kThreads - 1, 0); }
static void matrix_of_a_tile_too_many() { multiply<false>(true, kThreads, 32); }

constexpr int kGroupThreads = 32 * kGroupWarps, kGroupRows = 64, kGroupBytes = (kGroupRows + 16) * 128;

// Rows of 64 numbers: the first 64 by the next 16; and weights, in registers, by these 16.
static void multiply_by_groups(bool permuted, bool with_barrier, int threads, int rows) {
  const auto number = [](int row, int column) { return float((3 * row + 5 * column) % 7 - 3); };
  const auto weight = [](int row, int k) { return float((row + k) % 3); };
  const auto expect = [](float found, float expected) {
    if (found != expected) Machine::get().fail("a product is wrong");
  };
  for (int i = thread(); i < kGroupBytes / 16; i += kGroupThreads) {
    const int row = i / 8, vector = i % 8;
    uint32_t words[4];
    for (int w = 0; w < 4; ++w) {
      const int column = 8 * vector + 2 * w;
      words[w] = pack(number(row, column), number(row, column + 1), BFloat16{});
    }
    Shared<uint4>(0).set(8 * row + (permuted ? vector ^ row % 8 : vector), {words[0], words[1], words[2], words[3]});
  }
  if (with_barrier) sync_threads();
  if (thread() >= threads) return;
  const int row = thread() / 32 * 16 + thread() % 32 / 4, column = 2 * (thread() % 4);
  const GroupOperand other{kGroupRows * 128, rows, 1024};
  uint32_t weights[4];
  for (int i = 0; i < 4; ++i) {
    const int r = row + 8 * (i % 2), k = column + 8 * (i / 2);
    weights[i] = pack(weight(r, k), weight(r, k + 1), BFloat16{});
  }
  float sum[2][4] = {}, of_weights[8][4] = {};
  begin_group_products();
  for (int k = 0; k < 64; k += 16)
    group_multiply_add<16>(sum, {2 * k, 1024, 1024}, {other.offset + 2 * k, rows, 1024}, k > 0, BFloat16{});
  end_group_products(sum);
  begin_group_products();
  group_multiply_add<0>(of_weights, weights, other, BFloat16{});
  end_group_products(of_weights);
  for (int e = 0; e < 4; ++e) {
    const int r = row + 8 * (e / 2);
    for (int n = 0; n < 8; ++n) {
      const int c = 8 * n + column + e % 2;
      float total = 0, weighed = 0;
      for (int k = 0; k < 64; ++k) total += number(r, k) * number(kGroupRows + c % 16, k);
      for (int k = 0; k < 16; ++k) weighed += weight(r, k) * number(kGroupRows + k, c);
      if (n < 2) expect(sum[n][e], total);
      expect(of_weights[n][e], weighed);
    }
  }
  output[thread()] = sum[0][0];
}

static void group_sound() { multiply_by_groups(true, true, kGroupThreads, 1024); }
static void group_of_vectors_in_order() { multiply_by_groups(false, true, kGroupThreads, 1024); }
static void group_of_rows_elsewhere() { multiply_by_groups(true, true, kGroupThreads, 0); }
static void group_of_rows_too_far() { multiply_by_groups(true, true, kGroupThreads, 2048); }
static void group_read_too_soon() { multiply_by_groups(true, false, kGroupThreads, 1024); }
static void group_that_a_warp_skips() { multiply_by_groups(true, true, kGroupThreads - 32, 1024); }

}  // namespace fusednorm_cuda

int main(int argc, char** argv) {
  using namespace fusednorm_cuda;
  const std::string name = argc > 1 ? argv[1] : "";
  const struct {
    const char* name;
    void (*kernel)();
    int cluster;
    size_t shared_bytes = kThreads * 4;
    int threads = kThreads;
  } kernels[] = {
#define ENTRY(kernel, cluster) {#kernel, kernel, cluster}
      ENTRY(sound, 1),
      ENTRY(missing_barrier, 1),
      ENTRY(two_writers, 1),
      ENTRY(reused_without_barrier, 1),
      ENTRY(barriers_at_two_places, 1),
      ENTRY(barrier_that_some_skip, 1),
      ENTRY(shuffle_that_some_skip, 1),
      ENTRY(out_of_bounds, 1),
      ENTRY(shared_out_of_bounds, 1),
      ENTRY(shared_never_written, 1),
      ENTRY(misaligned, 1),
      ENTRY(cluster_sound, 2),
      ENTRY(cluster_missing_barrier, 2),
      ENTRY(arrivals_sound, 2),
      ENTRY(arrivals_that_never_come, 2),
      ENTRY(arrivals_of_another_round, 2),
      ENTRY(copies_sound, 1),
      ENTRY(copy_read_too_soon, 1),
      ENTRY(copy_never_waited_for, 1),
      ENTRY(copy_over_a_number_in_use, 1),
      ENTRY(copy_from_anywhere, 1),
#define MATRIX(kernel) {#kernel, kernel, 1, kMatrixBytes}
      MATRIX(matrix_sound),
      MATRIX(matrix_transposed),
      MATRIX(matrix_read_too_soon),
      MATRIX(matrix_that_some_skip),
      MATRIX(matrix_of_a_tile_too_many),
#define GROUP(kernel) {#kernel, kernel, 1, kGroupBytes, kGroupThreads}
      GROUP(group_sound),
      GROUP(group_of_vectors_in_order),
      GROUP(group_of_rows_elsewhere),
      GROUP(group_of_rows_too_far),
      GROUP(group_read_too_soon),
      GROUP(group_that_a_warp_skips),
  };
  for (const auto& k : kernels) {
    if (name != k.name) continue;
    for (uint64_t seed = 1; seed <= 4; ++seed) {
      Machine::get().seed = seed;
      try {
        Machine::get().run({{unsigned(k.cluster), 1, 1}, {unsigned(k.threads), 1, 1}, k.cluster, k.shared_bytes, k.kernel});
      } catch (const std::exception& fault) {
        std::fprintf(stderr, "%s\n", fault.what());
        return 1;
      }
      for (float value : output) std::printf("%g ", double(value));
      std::printf("\n");
    }
    return 0;
  }
  std::fprintf(stderr, "no kernel is called '%s'\n", name.c_str());
  return 2;
}
