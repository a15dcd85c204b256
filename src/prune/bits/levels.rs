//! Numbers of bits, and the types that have them.

use crate::quant::BlockType;

/// Types of about as many bits a weight: the first of them whose blocks fit a row is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Level(&'static [BlockType]);

impl Level {
    /// All levels, by falling bits. Blocks of 256 come first where they are better than those of 32 in fewer bytes.
    pub const ALL: [Level; 7] = [
        Level(&[BlockType::Q8_0]),
        Level(&[BlockType::Q6_K, BlockType::Q5_1]),
        Level(&[BlockType::Q5_K, BlockType::Q5_0]),
        Level(&[BlockType::Q4_K, BlockType::Q4_1]),
        Level(&[BlockType::IQ4_XS, BlockType::IQ4_NL]),
        Level(&[BlockType::Q3_K]),
        Level(&[BlockType::Q2_K]),
    ];

    /// The level of exactly this type.
    pub fn of(block_type: BlockType) -> Self {
        let place = BlockType::ALL.iter().position(|t| *t == block_type);
        let place = place.expect("all types are there");
        Self(&BlockType::ALL_IN_ORDER[place..=place])
    }

    /// Its types.
    pub fn types(self) -> &'static [BlockType] {
        self.0
    }

    /// The level of these types; `None` if there is none.
    pub fn of_types(types: &[BlockType]) -> Option<Self> {
        match Self::ALL.into_iter().find(|level| level.0 == types) {
            Some(level) => Some(level),
            None => match types {
                [one] => Some(Self::of(*one)),
                _ => None,
            },
        }
    }

    /// The type that a matrix of a type and of rows of so many columns takes at this level: its own where no type of the level fits, or
    /// none is smaller.
    pub fn type_for(self, own: BlockType, columns: usize) -> BlockType {
        let bytes = |t: BlockType| t.checked_row_bytes(columns);
        let fitting = self.0.iter().find(|t| bytes(**t).is_some());
        match fitting {
            Some(t) if bytes(*t) < bytes(own) => *t,
            _ => own,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_takes_the_type_that_fits_its_rows_and_is_smaller() {
        let of = |level: usize, own, columns| Level::ALL[level].type_for(own, columns);
        assert_eq!(of(1, BlockType::F16, 512), BlockType::Q6_K);
        assert_eq!(of(1, BlockType::F16, 576), BlockType::Q5_1);
        // Nothing of three bits has blocks of 32.
        assert_eq!(of(5, BlockType::F16, 576), BlockType::F16);
        assert_eq!(of(2, BlockType::Q4_1, 576), BlockType::Q4_1);
        assert_eq!(of(4, BlockType::Q4_1, 576), BlockType::IQ4_NL);
    }

    #[test]
    fn levels_have_fewer_and_fewer_bits_in_rows_of_any_length() {
        for columns in [576, 1024] {
            let mut bytes = usize::MAX;
            for level in Level::ALL {
                let own = BlockType::F32;
                let now = level.type_for(own, columns);
                if now != own {
                    assert!(now.row_bytes(columns) < bytes, "{columns} {now:?}");
                    bytes = now.row_bytes(columns);
                }
            }
        }
    }
}
