//! Pictures and captions: decoding under limits, transforms, order.
