//! Compressed streams, expanded with a limit: a file of a few kilobytes must not become gigabytes.
//!
//! Knows no format inside.

use std::io::{self, BufRead, Read};

use flate2::bufread::MultiGzDecoder;

/// Bytes that any stream may expand to.
const FREE_BYTES: u64 = 64 << 20;
/// Times its own size that a stream may expand to beyond that: images hardly shrink, text does tenfold.
const MAX_RATIO: u64 = 100;

/// How a file is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// Not at all.
    None,
    /// gzip, in one member or several.
    Gzip,
    /// Zstandard.
    Zstd,
}

impl Packing {
    /// Tells it from the name.
    pub fn of(name: &str) -> Self {
        if name.ends_with("gz") {
            Self::Gzip
        } else if name.ends_with("zst") {
            Self::Zstd
        } else {
            Self::None
        }
    }
}

/// An expanded stream that ends with an error where it grows beyond reason.
pub struct Expanding<'a> {
    inner: Box<dyn Read + 'a>,
    num_read: u64,
    limit: u64,
    trailing_zeros: u64,
}

impl<'a> Expanding<'a> {
    /// Expands `packed`, a file of `size` bytes.
    ///
    /// # Errors
    /// When the decoder cannot be made.
    pub fn new(packing: Packing, packed: impl BufRead + 'a, size: u64) -> io::Result<Self> {
        let inner: Box<dyn Read + 'a> = match packing {
            Packing::None => Box::new(packed),
            Packing::Gzip => Box::new(MultiGzDecoder::new(packed)),
            Packing::Zstd => Box::new(zstd::Decoder::with_buffer(packed)?),
        };
        let limit = FREE_BYTES.max(size.saturating_mul(MAX_RATIO));
        Ok(Self { inner, num_read: 0, limit, trailing_zeros: 0 })
    }

    /// Returns the number of zero bytes that were read last.
    pub fn trailing_zeros(&self) -> u64 {
        self.trailing_zeros
    }
}

impl Read for Expanding<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.num_read += count as u64;
        if self.num_read > self.limit {
            let text = format!("it expands to more than {} bytes: a decompression bomb", self.limit);
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        match buffer[..count].iter().rposition(|&byte| byte != 0) {
            Some(last) => self.trailing_zeros = (count - 1 - last) as u64,
            None => self.trailing_zeros += count as u64,
        }
        Ok(count)
    }
}
