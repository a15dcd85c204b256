//! Fields of a few bits spread over bytes, the way every block format stores its codes, and scales in half precision.
//!
//! All the formats follow one scheme with two parameters, BITS and RUN. The bytes come in stretches of RUN. A stretch
//! holds RUN · 8 / BITS values: the first RUN of them in the lowest BITS bits of its bytes in order, the next RUN in
//! the bits above, and so on. Value i is therefore in byte `RUN · (i / (RUN · 8 / BITS)) + i % RUN`, from bit
//! `BITS · (i / RUN % (8 / BITS))` on.

use half::f16;

/// The half-precision number in the two bytes of a block from `at` on.
pub(super) fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Reads a field for each of `codes` and places it there from bit `shift` on, beside what is already set.
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

/// The reverse of [`unpack`]: writes the BITS bits from `shift` on of each of `codes`.
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
