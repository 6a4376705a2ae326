// What the shortcut, which is linked to the CPU library, finds in it.
#pragma once

#define FUSEDNORM_EXPORT __attribute__((visibility("default")))
