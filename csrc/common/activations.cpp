#include "activations.h"

#include "export.h"

// For those who load the library: the names in the order of their numbers, each with a blank after it.
extern "C" FUSEDNORM_EXPORT const char fusednorm_activations[] =
#define FN_NAME(enumerator, name, ...) name " "
    FN_ACTIVATIONS(FN_NAME);
#undef FN_NAME
