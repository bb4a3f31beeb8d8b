//! Room for results that are about to be written whole.

/// `len` values that the caller overwrites before any is read: what is in them is arbitrary.
///
/// A step of the demo spent a tenth of its time on filling results with zeros. In tests they are filled with NaN instead, so
/// that a value which an op forgets shows.
pub(super) fn room(len: usize) -> Vec<f32> {
    #[cfg(all(not(test), any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        let mut values: Vec<f32> = Vec::with_capacity(len);
        #[expect(unsafe_code, reason = "the point of this function")]
        // SAFETY: for the compiler, the empty assembly may have written all `len` values through the pointer, which has room for
        // them: they are arbitrary numbers, not uninitialised memory. Every bit pattern is an f32.
        unsafe {
            std::arch::asm!("/* {} */", in(reg) values.as_mut_ptr(), options(nostack, preserves_flags));
            values.set_len(len);
        }
        values
    }
    #[cfg(not(all(not(test), any(target_arch = "x86_64", target_arch = "aarch64"))))]
    vec![if cfg!(test) { f32::NAN } else { 0.0 }; len]
}
