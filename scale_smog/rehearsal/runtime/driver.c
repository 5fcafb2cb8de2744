// The driver's symbols that torch's libraries link; nothing that a rehearsal runs calls them.
#define API __attribute__((visibility("default")))
#define STUB(name) API int name(void) { return 0; }
STUB(cuCtxGetCurrent) STUB(cuCtxSetCurrent) STUB(cuDeviceGet) STUB(cuDeviceGetAttribute)
STUB(cuDevicePrimaryCtxRetain) STUB(cuFuncGetAttribute) STUB(cuFuncSetAttribute)
STUB(cuFuncSetCacheConfig) STUB(cuGetErrorString) STUB(cuLaunchCooperativeKernel)
STUB(cuLaunchKernel) STUB(cuLinkAddData_v2) STUB(cuLinkComplete) STUB(cuLinkCreate_v2)
STUB(cuModuleGetFunction) STUB(cuModuleLoad) STUB(cuModuleLoadData) STUB(cuModuleLoadDataEx)
STUB(cuModuleUnload) STUB(cuOccupancyMaxActiveBlocksPerMultiprocessor)
STUB(cuPointerGetAttribute) STUB(cuTensorMapEncodeTiled)
