//! Names of the keys, or columns, of a format whose records are laid out as the user likes: JSON lines and Parquet.
//!
//! Knows what the names are for, not how a record is read.

use crate::sample::SetKind;

/// Names of the keys, or columns, that make a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldNames {
    /// Of the text.
    pub text: String,
    /// Of the image to be made.
    pub image: String,
    /// Of the images that an instruction is about; empty for captions.
    pub reference: String,
    /// References kept of a record; 0 keeps all.
    pub max_references: usize,
}

impl FieldNames {
    /// Returns what records of these names are.
    pub(crate) fn kind(&self) -> SetKind {
        if self.reference.is_empty() { SetKind::Generation } else { SetKind::Edit }
    }
}

/// Returns the references that are kept of a record's; `max_references` 0 keeps all.
pub(crate) fn kept<T>(all: &[T], max_references: usize) -> &[T] {
    if max_references == 0 { all } else { &all[..max_references.min(all.len())] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_keeps_all_references() {
        assert_eq!(kept(&[1, 2, 3], 0), [1, 2, 3]);
        assert_eq!(kept(&[1, 2, 3], 2), [1, 2]);
        assert_eq!(kept(&[1, 2, 3], 4), [1, 2, 3]);
        assert!(kept::<u8>(&[], 1).is_empty());
    }
}
