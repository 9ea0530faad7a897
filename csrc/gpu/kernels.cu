// Every kernel, for one fat binary (mii_hcache/_gpu.fatbin): nvcc makes one of one source.
#include "crc32c.cu"
#include "rope_scatter.cu"
