//! Sources over HTTP, from a server of this test's own: whole, in ranges, missing, cut off, and changed meanwhile.
#![cfg(feature = "cloud")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use deepgen_contract::data::{FilterSettings, PrepareSettings, SourceSettings};
use deepgen_data::dataset::PreparedDataset;
use deepgen_data::prepare::{PreparePlace, prepare};
use deepgen_data::source::{DataSource, Found, ScanError};
use deepgen_data::sources::{self, SourcePlace};

/// What a server does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flaw {
    None,
    /// It knows no ranges.
    NoRanges,
    /// It ends this many answers in their middle.
    CutsOff(usize),
    /// It has another version of a file after the first answer.
    Changes,
}

/// A request for a file and the range it names.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Asked {
    path: String,
    range: Option<(usize, usize)>,
}

/// Files at paths, and what was asked for.
struct Server {
    address: String,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Server {
    fn start(files: &[(&str, Vec<u8>)], flaw: Flaw) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let files: BTreeMap<String, Vec<u8>> =
            files.iter().map(|(path, bytes)| ((*path).to_owned(), bytes.clone())).collect();
        let log = Arc::clone(&asked);
        // One connection at a time is enough; the thread ends with the test.
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                let _ = answer(connection.unwrap(), &files, flaw, &log);
            }
        });
        Self { address, asked }
    }

    fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }
}

fn answer(
    connection: TcpStream,
    files: &BTreeMap<String, Vec<u8>>,
    flaw: Flaw,
    log: &Mutex<Vec<Asked>>,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(&connection).lines();
    let request = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let mut headers = BTreeMap::new();
    for line in lines {
        let line = line?;
        let Some((key, value)) = line.split_once(':') else { break };
        headers.insert(key.to_ascii_lowercase(), value.trim().to_owned());
    }
    let (method, path) = request.split_once(' ').unwrap_or_default();
    let path = path.split(' ').next().unwrap_or_default();
    let reply = |head: &str, body: &[u8]| {
        (&connection).write_all(format!("HTTP/1.1 {head}\r\nConnection: close\r\n\r\n").as_bytes())?;
        (&connection).write_all(body)
    };
    if method != "GET" {
        return reply("405 Method Not Allowed\r\nContent-Length: 0", &[]);
    }
    let Some(bytes) = files.get(path) else { return reply("404 Not Found\r\nContent-Length: 0", &[]) };
    let range = headers.get("range").and_then(|range| {
        let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().ok()?, last.parse::<usize>().ok()?.min(bytes.len().saturating_sub(1)) + 1))
    });
    let number = {
        let mut log = log.lock().unwrap();
        log.push(Asked { path: path.into(), range });
        log.len()
    };
    let tag = if flaw == Flaw::Changes { format!("ETag: \"v{}\"\r\n", number.min(2)) } else { String::new() };
    if headers.get("if-match").is_some_and(|wanted| !tag.contains(wanted)) {
        return reply("412 Precondition Failed\r\nContent-Length: 0", &[]);
    }
    let (head, body) = match range {
        Some((first, _)) if flaw != Flaw::NoRanges && first >= bytes.len() => {
            return reply("416 Range Not Satisfiable\r\nContent-Length: 0", &[]);
        }
        Some((first, end)) if flaw != Flaw::NoRanges => {
            let place = format!("bytes {first}-{}/{}", end - 1, bytes.len());
            (format!("206 Partial Content\r\nContent-Range: {place}"), &bytes[first..end])
        }
        _ => ("200 OK".to_owned(), &bytes[..]),
    };
    let sent = match flaw {
        Flaw::CutsOff(times) if number <= times => &body[..body.len() / 2],
        _ => body,
    };
    reply(&format!("{head}\r\n{tag}Content-Length: {}", body.len()), sent)
}

/// A shard of `count` samples whose images have `size` bytes each.
fn shard(count: u8, size: usize) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for number in 0..count {
        let caption = format!("{{\"caption\":\"picture {number}\"}}");
        for (name, bytes) in [("png", vec![number; size]), ("json", caption.into_bytes())] {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, format!("{number:03}.{name}"), &*bytes).unwrap();
        }
    }
    builder.into_inner().unwrap()
}

/// Reads the shards at `address`; fetched files lie below `out` for a while.
fn scanned(address: &str, out: &Path) -> Result<Vec<Found>, ScanError> {
    let settings = SourceSettings::Tar { shards: address.into(), caption_key: "caption".into() };
    let place = SourcePlace { seed: 0, project_root: Path::new("/"), out_dir: out };
    let source = match sources::open(&settings, place) {
        Ok(source) => source,
        Err(sources::OpenError::Scan(error)) => return Err(error),
        Err(error) => panic!("{error}"),
    };
    let mut all = Vec::new();
    source.scan(&mut |found| {
        all.push(found);
        true
    })?;
    Ok(all)
}

fn texts(found: &[Found]) -> Vec<&str> {
    found.iter().map(|found| found.as_ref().unwrap().text.as_str()).collect()
}

#[test]
fn a_shard_comes_in_ranges_that_cover_it_once() {
    // Twenty megabytes: three requests.
    let bytes = shard(5, 4 << 20);
    let server = Server::start(&[("/sets/a.tar", bytes.clone())], Flaw::None);
    let out = tempfile::tempdir().unwrap();
    let found = scanned(&format!("{}/sets/a.tar", server.address), out.path()).unwrap();
    assert_eq!(texts(&found), ["picture 0", "picture 1", "picture 2", "picture 3", "picture 4"]);
    for (number, found) in found.iter().enumerate() {
        let held = found.as_ref().unwrap().image.as_ref().unwrap().held.clone().unwrap();
        assert!(held.len() == 4 << 20 && held.iter().all(|&byte| byte == number as u8));
    }
    let mut ranges: Vec<_> = server.asked().iter().map(|asked| asked.range.unwrap()).collect();
    ranges.sort_unstable();
    assert_eq!(ranges.len(), 3);
    assert_eq!((ranges[0].0, ranges[2].1), (0, bytes.len()));
    assert!(ranges.windows(2).all(|pair| pair[0].1 == pair[1].0), "{ranges:?}");
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0, "what was fetched is removed");
}

#[test]
fn a_server_without_ranges_is_read_whole() {
    let server = Server::start(&[("/a.tar", shard(3, 4 << 20))], Flaw::NoRanges);
    let out = tempfile::tempdir().unwrap();
    assert_eq!(scanned(&format!("{}/a.tar", server.address), out.path()).unwrap().len(), 3);
    assert_eq!(server.asked().len(), 2, "one request with a range, one without");
}

#[test]
fn an_empty_object_is_a_damaged_shard_and_no_endless_wait() {
    let server = Server::start(&[("/a.tar", Vec::new())], Flaw::None);
    let out = tempfile::tempdir().unwrap();
    let found = scanned(&format!("{}/a.tar", server.address), out.path()).unwrap();
    assert_eq!(found.len(), 1);
    assert!(found[0].as_ref().unwrap_err().reason.contains("no end mark"), "{found:?}");
}

#[test]
fn a_missing_object_is_named() {
    let server = Server::start(&[("/a-0.tar", shard(1, 10))], Flaw::None);
    let out = tempfile::tempdir().unwrap();
    let address = format!("{}/a-{{0..1}}.tar", server.address);
    let error = scanned(&address, out.path()).unwrap_err().to_string();
    assert!(error.contains(&address) && error.contains("(a-1.tar): there is no such object"), "{error}");
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0, "what was fetched is removed");
    let error = open_error(&format!("{}/*.tar", server.address), out.path());
    assert!(error.contains("cannot list the folder") && error.contains("{000..127}"), "{error}");
}

fn open_error(address: &str, out: &Path) -> String {
    scanned(address, out).unwrap_err().to_string()
}

#[test]
fn an_answer_that_is_cut_off_once_is_asked_for_again() {
    let server = Server::start(&[("/a.tar", shard(2, 100_000))], Flaw::CutsOff(1));
    let out = tempfile::tempdir().unwrap();
    assert_eq!(texts(&scanned(&format!("{}/a.tar", server.address), out.path()).unwrap()), ["picture 0", "picture 1"]);
    assert_eq!(server.asked().len(), 2);
}

#[test]
fn an_answer_that_is_always_cut_off_ends_the_source() {
    let bytes = shard(2, 100_000);
    let server = Server::start(&[("/a.tar", bytes)], Flaw::CutsOff(usize::MAX));
    let out = tempfile::tempdir().unwrap();
    let error = open_error(&format!("{}/a.tar", server.address), out.path());
    assert!(error.contains("(a.tar): bytes 0..8388608 were cut off 3 times"), "{error}");
    assert_eq!(server.asked().len(), 3);
}

#[test]
fn an_object_that_changes_meanwhile_is_no_mixture_of_both() {
    let server = Server::start(&[("/a.tar", shard(3, 4 << 20))], Flaw::Changes);
    let out = tempfile::tempdir().unwrap();
    let error = open_error(&format!("{}/a.tar", server.address), out.path());
    assert!(error.contains("412"), "{error}");
}

#[test]
fn a_set_is_prepared_from_a_store_and_needs_it_no_more() {
    let mut png = std::io::Cursor::new(Vec::new());
    image::RgbImage::from_pixel(100, 120, image::Rgb([9, 8, 7])).write_to(&mut png, image::ImageFormat::Png).unwrap();
    let shard = |number: u32| {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, bytes) in [("a.png", png.get_ref().clone()), ("a.txt", format!("shard {number}").into_bytes())] {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, &*bytes).unwrap();
        }
        builder.into_inner().unwrap()
    };
    let server = Server::start(&[("/s/8.tar", shard(8)), ("/s/9.tar", shard(9)), ("/s/10.tar", shard(10))], Flaw::None);
    let out = tempfile::tempdir().unwrap();
    let settings = PrepareSettings {
        source: SourceSettings::Tar {
            shards: format!("{}/s/{{8..10}}.tar", server.address),
            caption_key: "caption".into(),
        },
        nominal_size: 0,
        filters: FilterSettings { min_side: 80, min_aspect: 0.1, max_aspect: 10.0 },
        dedupe: false,
    };
    let place = PreparePlace { seed: 0, project_root: Path::new("/"), out_dir: out.path(), num_threads: 1 };
    assert_eq!(prepare(&settings, &place, &mut |_| true).unwrap().dataset.num_samples, 3);
    let dataset = PreparedDataset::open(out.path()).unwrap();
    let all: Vec<_> = (0..3).map(|index| dataset.get(index).unwrap()).collect();
    assert_eq!(all.iter().map(|s| s.text.as_str()).collect::<Vec<_>>(), ["shard 8", "shard 9", "shard 10"]);
    assert!(all.iter().all(|sample| sample.image.get_pixel(5, 5).0 == [9, 8, 7]));
}
