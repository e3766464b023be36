"""Memory against time: `options` are a config's `speed`, `offload` keeps a frozen network's weights off the device."""
