// torch_parallel_for on threads of its own, each begun and joined where ThreadSanitizer sees it: of the barriers of
// OpenMP, which torch's runs on, it knows nothing, and takes all that the threads share for races.
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*work)(int64_t, int64_t, void*),
                                      void* context) {
  const int64_t most = 3, step = std::max<int64_t>(grain, (end - begin + most - 1) / most);
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += step)
    threads.emplace_back([=] { work(first, std::min(first + step, end), context); });
  for (std::thread& thread : threads) thread.join();
  return 0;
}
