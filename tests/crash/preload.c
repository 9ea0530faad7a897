int crash_is_there(void) { return 1; }
