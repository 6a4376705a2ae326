// Runs CUDA kernels on the host: what `device.cuh` takes from CUDA under nvcc, it takes from here under a host compiler.
//
// The threads of a block, or of all blocks of a cluster, are fibers in an order drawn from a seed. A barrier waits for
// every thread, at the same place in the source; a shuffle waits for every lane of its mask.
#pragma once

#include <array>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "fibers.h"
#include "shared_memory.h"

namespace fusednorm_emulation {

constexpr int kWarp = 32;

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct Place {
  const char* file;
  int line;
  bool operator!=(const Place& other) const {
    return line != other.line || (file != other.file && std::strcmp(file, other.file) != 0);
  }
  std::string name() const {
    const std::string path(file);
    return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
  }
};

// What a lane gives to the others of its warp.
using Words = std::array<uint32_t, 12>;

// Threads that wait for one another.
struct Barrier {
  std::vector<int> waiting;
  Place place{};
  uint32_t mask = 0;
};

// A thread's copies to shared memory that nobody waited for yet: there only then, though they may be any time before.
struct Copies {
  struct Copy {
    size_t offset;
    std::array<char, 16> bytes;
  };
  std::vector<Copy> begun;
  std::deque<std::vector<Copy>> groups;

  bool left() const {
    for (const auto& group : groups)
      if (!group.empty()) return true;
    return !begun.empty();
  }
};

// Bytes that the blocks of a cluster send to one of them, and how many it said there would be, over all rounds.
struct Mail {
  bool started;
  int64_t expected, received;
  int rounds;
};

class Machine {
 public:
  struct Launch {
    Dim3 grid, block;
    int cluster;  // blocks along x that run together
    size_t shared_bytes;
    std::function<void()> kernel;
  };

  static Machine& get() {
    static thread_local Machine machine;
    return machine;
  }

  uint64_t seed = 1;  // of the order of threads and blocks
  int device = 0;     // the current one
  std::map<int, std::string> faults;  // devices on which every launch fails, and what it says

  void run(const Launch& launch) {
    check(launch);
    launch_ = &launch;
    threads_ = int(launch.block.x * launch.block.y);
    const unsigned clusters = launch.grid.x / launch.cluster * launch.grid.y;
    for (unsigned i = 0; i < clusters; ++i) run_cluster(unsigned((i + seed * 7) % clusters));
    launch_ = nullptr;
    seed = seed * 6364136223846793005u + 1442695040888963407u;
  }

  Dim3 thread_index() const {
    const unsigned t = unsigned(fibers_.current() % threads_);
    return {t % launch_->block.x, t / launch_->block.x, 0};
  }
  Dim3 block_index() const { return {first_block_.x + unsigned(block()), first_block_.y, 0}; }
  Dim3 block_dimension() const { return launch_->block; }
  Dim3 grid_dimension() const { return launch_->grid; }
  unsigned cluster_rank() const { return unsigned(block()); }
  unsigned cluster_size() const { return unsigned(launch_->cluster); }

  void sync_threads(Place place) {
    meet(block_barriers_[block()], threads_, place, 0, "__syncthreads");
  }

  void sync_cluster(Place place) { meet(cluster_barrier_, threads_ * launch_->cluster, place, 0, "cluster barrier"); }

  // The value of the lane `lane ^ offset`.
  uint64_t shuffle_xor(uint32_t mask, uint64_t value, int offset, Place place) {
    const int self = fibers_.current(), lane = self % threads_ % kWarp, partner = lane ^ offset;
    const int first = self - lane, lanes = std::min(kWarp, threads_ - (first % threads_));
    if (!(mask >> lane & 1)) fibers_.fail(at(place) + "shuffle: lane " + std::to_string(lane) + " is not in its own mask");
    if (mask != (lanes == kWarp ? ~0u : mask & ((1u << lanes) - 1)))
      fibers_.fail(at(place) + "shuffle: the mask names lanes that the block does not have");
    if (partner >= kWarp || !(mask >> partner & 1))
      fibers_.fail(at(place) + "shuffle: lane " + std::to_string(lane) + " reads lane " + std::to_string(partner) +
                   ", which is not in the mask");
    const Words* const all = give({uint32_t(value), uint32_t(value >> 32)}, mask, place, "shuffle");
    return all[partner][0] | uint64_t(all[partner][1]) << 32;
  }

  // The kernel ends, and its launch throws.
  void fail(const std::string& message) { fibers_.fail(message); }

  int lane() const { return fibers_.current() % threads_ % kWarp; }

  // What each lane of a whole warp gives, until the lane gives again twice.
  const Words* exchange(const Words& mine, Place place) {
    if (threads_ % kWarp) fibers_.fail(at(place) + "a warp that is not whole");
    return give(mine, ~0u, place, "exchange");
  }

  // The warps of a block that are one warpgroup. It orders no memory.
  void meet_group(int warps, Place place) {
    if (threads_ != warps * kWarp) fibers_.fail(at(place) + "a block that is no warpgroup");
    meet(group_barriers_[block()], threads_, place, 0, "warpgroup");
  }

  // A barrier of the block, and whether any thread says yes.
  bool sync_threads_or(bool yes, Place place) {
    const size_t round = size_t(votes_of_[fibers_.current()]++);
    std::vector<char>& votes = votes_[block()];
    if (votes.size() <= round) votes.resize(round + 1);
    votes[round] |= char(yes);
    meet(block_barriers_[block()], threads_, place, 0, "__syncthreads_or");
    return votes[round];
  }

  template <class T>
  T shared_read(unsigned rank, size_t offset, int line) {
    touch(rank, offset, sizeof(T), false, line);
    T value;
    shared_[rank].read(offset, &value, sizeof(T));
    return value;
  }

  Mail& mail(unsigned rank, int offset) { return mail_[{rank, offset}]; }

  void expect_mail(int offset, int bytes) {
    Mail& m = mail(unsigned(block()), offset);
    m.expected += bytes, ++m.rounds;
  }

  // After all have met: nobody sends to this place again before every thread has been here.
  void check_mail(int offset, bool odd) {
    const Mail& m = mail(unsigned(block()), offset);
    if (!m.started) fibers_.fail("a barrier of arrivals that was not started");
    if (m.expected != m.received)
      fibers_.fail("arrivals: " + std::to_string(m.received) + " bytes came, " + std::to_string(m.expected) + " were expected");
    if (bool((m.rounds - 1) & 1) != odd) fibers_.fail("arrivals: a wait for another round than this one");
  }

  void begin_copy(size_t offset, const void* bytes, int line) {
    Copies::Copy copy{offset, {}};
    std::memcpy(copy.bytes.data(), bytes, copy.bytes.size());
    touch(unsigned(block()), offset, copy.bytes.size(), true, line);
    shared_[block()].forget(offset, copy.bytes.size());
    copies_[fibers_.current()].begun.push_back(copy);
  }

  void commit_copies() {
    Copies& copies = copies_[fibers_.current()];
    copies.groups.push_back(std::move(copies.begun));
    copies.begun.clear();
  }

  void wait_copies(size_t pending, int line) {
    auto& groups = copies_[fibers_.current()].groups;
    for (; groups.size() > pending; groups.pop_front())
      for (const Copies::Copy& copy : groups.front()) shared_write(unsigned(block()), copy.offset, copy.bytes, line);
  }

  template <class T>
  void shared_write(unsigned rank, size_t offset, const T& value, int line) {
    touch(rank, offset, sizeof(T), true, line);
    shared_[rank].write(offset, &value, sizeof(T));
  }

 private:
  int block() const { return fibers_.current() / threads_; }
  static std::string at(const Place& place) { return place.name() + ": "; }

  void check(const Launch& l) {
    const auto fault = faults.find(device);
    if (fault != faults.end()) throw std::runtime_error("launch of a kernel: " + fault->second);
    const auto require = [](bool holds, const char* what) {
      if (!holds) throw std::runtime_error(std::string("invalid launch: ") + what);
    };
    require(l.grid.x && l.grid.y && l.grid.y <= 65535 && l.grid.x < (1u << 31), "grid");
    require(l.block.x && l.block.y && l.block.x * l.block.y <= 1024, "block");
    require(l.cluster >= 1 && l.cluster <= 8 && l.grid.x % l.cluster == 0, "cluster");
    require(l.shared_bytes <= 227 << 10, "shared memory");
  }

  void run_cluster(unsigned index) {
    const int blocks = launch_->cluster, count = blocks * threads_;
    const unsigned across = launch_->grid.x / blocks;
    first_block_ = {index % across * blocks, index / across, 0};
    block_barriers_.assign(blocks, {});
    group_barriers_.assign(blocks, {});
    warp_barriers_.assign((count + kWarp - 1) / kWarp, {});
    cluster_barrier_ = {};
    block_intervals_.assign(blocks, 0);
    cluster_interval_ = 0;
    turns_.assign(count, 0);
    votes_of_.assign(count, 0);
    votes_.assign(blocks, {});
    copies_.assign(count, {});
    mail_.clear();
    slots_[0].assign(count, {});
    slots_[1].assign(count, {});
    shared_.resize(blocks);
    for (SharedMemory& memory : shared_) memory.start(launch_->shared_bytes);
    if (!fibers_.run(count, seed + index, [](int) { get().launch_->kernel(); })) throw std::runtime_error(stalled());
    for (const Copies& copies : copies_)
      if (copies.left()) throw std::runtime_error("a copy to shared memory that its thread did not wait for");
  }

  const Words* give(const Words& mine, uint32_t mask, Place place, const char* what) {
    const int self = fibers_.current(), first = self - lane();
    std::vector<Words>& slots = slots_[turns_[self]++ & 1];  // two a lane: one barrier an exchange is enough
    slots[self] = mine;
    meet(warp_barriers_[first / kWarp], __builtin_popcount(mask), place, mask, what);
    return &slots[first];
  }

  void meet(Barrier& barrier, int expected, Place place, uint32_t mask, const char* what) {
    if (barrier.waiting.empty()) barrier.place = place, barrier.mask = mask;
    if (barrier.place != place || barrier.mask != mask)
      fibers_.fail(std::string("divergent ") + what + ": thread " + std::to_string(fibers_.current()) + " is at " +
                   place.name() + ", thread " + std::to_string(barrier.waiting[0]) + " waits at " + barrier.place.name());
    if (int(barrier.waiting.size()) + 1 < expected) {
      barrier.waiting.push_back(fibers_.current());
      fibers_.wait();
      return;
    }
    if (&barrier == &cluster_barrier_) {
      ++cluster_interval_;
      for (uint64_t& interval : block_intervals_) ++interval;
    } else if (&barrier == &block_barriers_[block()]) {
      ++block_intervals_[block()];
    }
    for (int fiber : barrier.waiting) fibers_.wake(fiber);
    barrier.waiting.clear();
    fibers_.wake(fibers_.current());  // the last one goes on no sooner than the others
    fibers_.wait();
  }

  std::string stalled() const {
    std::map<std::string, int> places;
    const auto count = [&](const Barrier& b) {
      if (!b.waiting.empty()) places[b.place.name()] += int(b.waiting.size());
    };
    for (const Barrier& b : block_barriers_) count(b);
    for (const Barrier& b : group_barriers_) count(b);
    for (const Barrier& b : warp_barriers_) count(b);
    count(cluster_barrier_);
    std::string message = "divergent barrier: nothing can go on;";
    for (const auto& [place, threads] : places) message += " " + std::to_string(threads) + " threads wait at " + place + ";";
    return message + " the others have ended";
  }

  void touch(unsigned rank, size_t offset, size_t size, bool write, int line) {
    if (rank >= shared_.size()) fibers_.fail("shared memory of block " + std::to_string(rank) + " of the cluster: there is none");
    const Moment now{fibers_.current(), block(), block_intervals_[block()], cluster_interval_};
    const std::string fault = shared_[rank].access(offset, size, now, write);
    if (!fault.empty()) fibers_.fail("line " + std::to_string(line) + ": " + fault);
  }

  Fibers fibers_;
  const Launch* launch_ = nullptr;
  int threads_ = 1;
  Dim3 first_block_;
  std::vector<Barrier> block_barriers_, warp_barriers_, group_barriers_;
  Barrier cluster_barrier_;
  std::vector<uint64_t> block_intervals_;
  uint64_t cluster_interval_ = 0;
  std::vector<int> turns_;
  std::vector<Words> slots_[2];
  std::vector<int> votes_of_;  // how often a thread voted
  std::vector<std::vector<char>> votes_;  // by block
  std::vector<Copies> copies_;
  std::map<std::pair<unsigned, int>, Mail> mail_;  // by block, and where its barrier lies
  std::vector<SharedMemory> shared_;
};

}  // namespace fusednorm_emulation
