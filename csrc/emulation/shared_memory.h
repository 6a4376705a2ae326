// Shared memory of an emulated block: poisoned at its start, every access checked for bounds and for races.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace fusednorm_emulation {

// Where a thread stands: barriers order what lies in different intervals.
struct Moment {
  int thread = -1, block = -1;  // within the cluster; nobody
  uint64_t block_interval = 0, cluster_interval = 0;
};

class SharedMemory {
 public:
  void start(size_t bytes) {
    bytes_.assign(bytes, char(0xA5));
    marks_.assign((bytes + kGrain - 1) / kGrain, Mark{});
  }

  // What is wrong with an access, or nothing.
  std::string access(size_t offset, size_t size, const Moment& now, bool write) {
    if (offset + size > bytes_.size())
      return "shared memory: byte " + std::to_string(offset + size - 1) + " of " + std::to_string(bytes_.size());
    for (size_t i = offset / kGrain; i <= (offset + size - 1) / kGrain; ++i) {
      Mark& mark = marks_[i];
      if (unordered(mark.writer, now)) return race(i, mark.writer, now, "wrote", write);
      if (!write) {
        if (mark.writer.thread < 0)
          return "shared memory: thread " + name(now) + " read byte " + std::to_string(i * kGrain) + ", never written";
        if (mark.readers[0].thread != now.thread) mark.readers[1] = mark.readers[0];
        mark.readers[0] = now;
        continue;
      }
      for (const Moment& reader : mark.readers)
        if (unordered(reader, now)) return race(i, reader, now, "read", write);
      mark = {now, {}};
    }
    return "";
  }

  // As if never written: a copy is on its way there.
  void forget(size_t offset, size_t size) {
    for (size_t i = offset / kGrain; i <= (offset + size - 1) / kGrain; ++i) marks_[i] = Mark{};
    std::memset(bytes_.data() + offset, 0xA5, size);
  }

  void read(size_t offset, void* out, size_t size) const { std::memcpy(out, bytes_.data() + offset, size); }
  void write(size_t offset, const void* in, size_t size) { std::memcpy(bytes_.data() + offset, in, size); }

 private:
  static constexpr size_t kGrain = 4;

  // Of the readers since the write, the last, and the last that is another thread: if any reader of this interval is
  // not the thread that writes now, one of these two is not.
  struct Mark {
    Moment writer, readers[2];
  };

  static bool unordered(const Moment& a, const Moment& b) {
    if (a.thread < 0 || a.thread == b.thread) return false;
    return a.block == b.block ? a.block_interval == b.block_interval : a.cluster_interval == b.cluster_interval;
  }

  static std::string name(const Moment& m) { return std::to_string(m.thread) + " (block " + std::to_string(m.block) + ")"; }

  static std::string race(size_t grain, const Moment& before, const Moment& now, const char* did, bool write) {
    return "shared memory race at byte " + std::to_string(grain * kGrain) + ": thread " + name(before) + " " + did +
           " it and thread " + name(now) + (write ? " writes" : " reads") + " it, with no barrier between";
  }

  std::vector<char> bytes_;
  std::vector<Mark> marks_;
};

}  // namespace fusednorm_emulation
