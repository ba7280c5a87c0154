//! Event files that TensorBoard opens: scalars, images and text by tag and step.
//!
//! Knows the record format (length and content, each with a masked CRC-32C) and the few protobuf messages it needs, not what
//! the numbers mean. The files hold wall-clock times, so they lie beside the result, never in it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Folder of the event files within a job directory: `tensorboard --logdir artifacts/jobs`.
pub const TENSORBOARD_DIR: &str = "tensorboard";

/// One event file, appended to.
#[derive(Debug)]
pub struct EventFile {
    file: File,
}

impl EventFile {
    /// Creates a new event file in `folder`.
    ///
    /// # Errors
    /// When it cannot be created or written.
    pub fn create(folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let name = format!("events.out.tfevents.{}.{}", now() as u64, std::process::id());
        let mut events = Self { file: File::create(folder.join(name))? };
        // Event.file_version = 3
        events.write(&message(|event| {
            event.double(1, now());
            event.bytes(3, b"brain.Event:2");
        }))?;
        Ok(events)
    }

    /// Appends numbers of a step.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn scalars<'a>(&mut self, step: u64, values: impl IntoIterator<Item = (&'a str, f64)>) -> io::Result<()> {
        let values = values.into_iter().map(|(tag, value)| {
            message(|summary| {
                summary.bytes(1, tag.as_bytes());
                summary.float(2, value as f32);
            })
        });
        self.summary(step, values.collect())
    }

    /// Appends a PNG file's bytes, which hold an RGB image of `width` by `height` pixels.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn image(&mut self, step: u64, tag: &str, (width, height): (u32, u32), png: &[u8]) -> io::Result<()> {
        let image = message(|image| {
            image.varint(1, height.into());
            image.varint(2, width.into());
            // RGB
            image.varint(3, 3);
            image.bytes(4, png);
        });
        let value = message(|summary| {
            summary.bytes(1, tag.as_bytes());
            summary.bytes(4, &image);
        });
        self.summary(step, vec![value])
    }

    /// Appends a text, which TensorBoard reads as Markdown.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn text(&mut self, step: u64, tag: &str, text: &str) -> io::Result<()> {
        // TensorProto: dtype = DT_STRING (7), no dimensions, one string.
        let tensor = message(|tensor| {
            tensor.varint(1, 7);
            tensor.bytes(2, &[]);
            tensor.bytes(8, text.as_bytes());
        });
        let plugin = message(|plugin| plugin.bytes(1, b"text"));
        let metadata = message(|metadata| metadata.bytes(1, &plugin));
        let value = message(|summary| {
            summary.bytes(1, tag.as_bytes());
            summary.bytes(8, &tensor);
            summary.bytes(9, &metadata);
        });
        self.summary(step, vec![value])
    }

    fn summary(&mut self, step: u64, values: Vec<Vec<u8>>) -> io::Result<()> {
        let summary = message(|summary| values.iter().for_each(|value| summary.bytes(1, value)));
        self.write(&message(|event| {
            event.double(1, now());
            event.varint(2, step);
            event.bytes(5, &summary);
        }))
    }

    /// Appends a record in one write, so that a reader sees whole records but for the last.
    fn write(&mut self, event: &[u8]) -> io::Result<()> {
        let length = (event.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(event.len() + 16);
        record.extend_from_slice(&length);
        record.extend_from_slice(&masked_crc(&length).to_le_bytes());
        record.extend_from_slice(event);
        record.extend_from_slice(&masked_crc(event).to_le_bytes());
        self.file.write_all(&record)
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |elapsed| elapsed.as_secs_f64())
}

/// A protobuf message under construction.
#[derive(Default)]
struct Message(Vec<u8>);

fn message(fill: impl FnOnce(&mut Message)) -> Vec<u8> {
    let mut message = Message::default();
    fill(&mut message);
    message.0
}

impl Message {
    fn key(&mut self, field: u64, wire_type: u64) {
        self.raw_varint(field << 3 | wire_type);
    }

    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push((value & 0x7F) as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn varint(&mut self, field: u64, value: u64) {
        self.key(field, 0);
        self.raw_varint(value);
    }

    fn double(&mut self, field: u64, value: f64) {
        self.key(field, 1);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn float(&mut self, field: u64, value: f32) {
        self.key(field, 5);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.key(field, 2);
        self.raw_varint(value.len() as u64);
        self.0.extend_from_slice(value);
    }
}

/// CRC-32C, rotated and offset as the record format asks.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xA282_EAD8)
}

/// CRC-32C (Castagnoli), reflected polynomial 0x82F63B78.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let mut crc = i as u32;
            let mut bit = 0;
            while bit < 8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82F6_3B78 } else { crc >> 1 };
                bit += 1;
            }
            table[i] = crc;
            i += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc, byte| crc >> 8 ^ TABLE[((crc ^ u32::from(*byte)) & 0xFF) as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Splits the only file of a folder into records and checks both sums of each.
    fn records(folder: &Path) -> Vec<Vec<u8>> {
        let path = fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
        let bytes = fs::read(path).unwrap();
        let (mut rest, mut found) = (bytes.as_slice(), Vec::new());
        let word = |bytes: &[u8]| u32::from_le_bytes(bytes[..4].try_into().unwrap());
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(word(&rest[8..]), masked_crc(&rest[..8]));
            let event = &rest[12..12 + length];
            assert_eq!(word(&rest[12 + length..]), masked_crc(event));
            found.push(event.to_vec());
            rest = &rest[16 + length..];
        }
        found
    }

    #[test]
    fn the_checksum_is_castagnolis() {
        // RFC 3720 appendix B.4, and the check value of the CRC catalogue.
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8A91_36AA);
    }

    #[test]
    fn a_scalar_is_the_documented_message() {
        let folder = tempfile::tempdir().unwrap();
        let mut events = EventFile::create(folder.path()).unwrap();
        events.scalars(300, [("a", 1.0)]).unwrap();
        let records = records(folder.path());
        assert_eq!(records.len(), 2);
        assert!(records[0].ends_with(b"\x1a\x0dbrain.Event:2"));
        // step 300, then summary { value { tag: "a", simple_value: 1.0 } }
        assert_eq!(records[1][9..], *b"\x10\xac\x02\x2a\x0a\x0a\x08\x0a\x01a\x15\x00\x00\x80\x3f");
    }

    #[test]
    fn images_and_texts_are_whole_records() {
        let folder = tempfile::tempdir().unwrap();
        let mut events = EventFile::create(folder.path()).unwrap();
        events.image(1, "samples", (2, 3), b"png").unwrap();
        events.text(1, "notes", "hello").unwrap();
        let records = records(folder.path());
        assert!(records[1].windows(11).any(|w| w == b"\x08\x03\x10\x02\x18\x03\x22\x03png"));
        assert!(records[2].windows(5).any(|w| w == b"hello") && records[2].windows(4).any(|w| w == b"text"));
    }
}
