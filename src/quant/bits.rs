//! Reading and writing fields of a few bits, which is how every block format stores its codes, and scales in half precision.
//!
//! All formats follow one scheme with two parameters, BITS and RUN. The bytes are divided into stretches of RUN bytes. A
//! stretch holds RUN · 8 / BITS values: the first RUN values are the lowest BITS bits of its bytes, in order; the next RUN
//! values are the BITS bits above those, and so on. Value i is therefore in byte `RUN · (i / (RUN · 8 / BITS)) + i % RUN`
//! and starts at bit `BITS · (i / RUN % (8 / BITS))` of it.

use half::f16;

/// The half-precision number that is stored at byte `at` of a block.
pub(super) fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Reads one field of BITS bits for each of `codes` and sets it in the code at bit `shift`; bits that are already set stay.
pub(super) fn unpack<const BITS: usize, const RUN: usize>(
    packed: &[u8],
    shift: usize,
    codes: &mut [u8],
) {
    let mask = (1u8 << BITS) - 1;
    let stretches = codes.chunks_exact_mut(RUN * 8 / BITS);
    for (bytes, codes) in packed.chunks_exact(RUN).zip(stretches) {
        for (plane, codes) in codes.chunks_exact_mut(RUN).enumerate() {
            for (code, byte) in codes.iter_mut().zip(bytes) {
                *code |= (byte >> (BITS * plane) & mask) << shift;
            }
        }
    }
}

/// Writes BITS bits of each of `codes`, those from bit `shift` on; the reverse of [`unpack`]. `packed` is overwritten.
pub(super) fn pack<const BITS: usize, const RUN: usize>(
    codes: &[u8],
    shift: usize,
    packed: &mut [u8],
) {
    let mask = (1u8 << BITS) - 1;
    let stretches = codes.chunks_exact(RUN * 8 / BITS);
    for (bytes, codes) in packed.chunks_exact_mut(RUN).zip(stretches) {
        bytes.fill(0);
        for (plane, codes) in codes.chunks_exact(RUN).enumerate() {
            for (byte, code) in bytes.iter_mut().zip(codes) {
                *byte |= (code >> shift & mask) << (BITS * plane);
            }
        }
    }
}
