// Read before each C++ source of a release's wheel, so that the wheel runs where torch's own does: from glibc 2.28 on.
#pragma once

// The C++ library's shared_ptr reads this variable of glibc 2.32 to tell whether counting has to be atomic. One of our
// own says that it has.
extern "C" {
extern char __libc_single_threaded;
__attribute__((weak, visibility("hidden"))) char __libc_single_threaded = 0;
}

// glibc 2.29 has another log, which leaves errno alone. The older one has the same results.
#ifdef __x86_64__
__asm__(".symver log, log@GLIBC_2.2.5");
#endif
