// What the fast path finds in a library.
#pragma once

#define FUSEDNORM_EXPORT __attribute__((visibility("default")))
