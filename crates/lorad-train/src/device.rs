//! Device names to candle devices.
