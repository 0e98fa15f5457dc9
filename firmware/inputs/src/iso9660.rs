//! A reader of ISO 9660 (ECMA-119) volumes: enough to find files of a config drive by name,
//! through Joliet, Rock Ridge or the plain names, whichever the writer provided.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

/// Longest file that is read, bytes.
pub const FILE_BYTES_MAX: u32 = 1 << 20;
const DIRECTORY_BYTES_MAX: u32 = 256 << 10;
const SECTOR_BYTES: usize = 2048;
const FIRST_DESCRIPTOR: u64 = 16;
const DESCRIPTORS_MAX: u64 = 16;
const CONTINUATIONS_MAX: usize = 4;

/// Where the bytes come from.
pub trait ReadAt {
    /// Why they could not be read.
    type Error;

    /// Fills `buffer`; offset and length are multiples of 2048.
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), Self::Error>;
}

/// Why a volume or file could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IsoError<E> {
    /// The disk.
    Read(E),
    /// No ISO 9660 volume, or one with sectors of another size than 2048.
    NotIso,
    /// No such file.
    NotFound,
    /// A file over [`FILE_BYTES_MAX`], or a directory too long to be honest.
    TooLong,
}

impl<E: fmt::Display> fmt::Display for IsoError<E> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            IsoError::Read(error) => error.fmt(out),
            IsoError::NotIso => out.write_str("no ISO 9660 volume"),
            IsoError::NotFound => out.write_str("no such file"),
            IsoError::TooLong => out.write_str("too long"),
        }
    }
}

impl<E> From<E> for IsoError<E> {
    fn from(error: E) -> Self {
        IsoError::Read(error)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Names {
    /// ISO names, and Rock Ridge's where they are.
    Plain,
    /// UCS-2, big endian.
    Joliet,
}

#[derive(Clone, Copy)]
struct Extent {
    sector: u32,
    bytes: u32,
}

struct Tree {
    names: Names,
    root: Extent,
}

/// A volume.
pub struct Volume<R> {
    source: R,
    label: String,
    /// Joliet first: its names are whole.
    trees: Vec<Tree>,
}

impl<R: ReadAt> Volume<R> {
    /// Reads the volume descriptors.
    pub fn open(mut source: R) -> Result<Volume<R>, IsoError<R::Error>> {
        let mut label = None;
        let mut trees = Vec::new();
        let mut sector = [0; SECTOR_BYTES];
        for number in FIRST_DESCRIPTOR..FIRST_DESCRIPTOR + DESCRIPTORS_MAX {
            source.read_at(number * SECTOR_BYTES as u64, &mut sector)?;
            if &sector[1..6] != b"CD001" {
                break;
            }
            let size_ok = u16_at(&sector, 128) == Some(SECTOR_BYTES as u16);
            let root = extent_of(&sector[156..190]);
            match (sector[0], root) {
                (1, Some(root)) if size_ok => {
                    label = Some(
                        String::from_utf8_lossy(&sector[40..72])
                            .trim_matches([' ', '\0'])
                            .to_string(),
                    );
                    trees.push(Tree { names: Names::Plain, root });
                }
                (2, Some(root)) if size_ok && is_joliet(&sector[88..91]) => {
                    trees.insert(0, Tree { names: Names::Joliet, root });
                }
                (255, _) => break,
                _ => {}
            }
        }
        let label = label.ok_or(IsoError::NotIso)?;
        Ok(Volume { source, label, trees })
    }

    /// The volume's label.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Reads a whole file, named by its path without a leading slash.
    pub fn read(&mut self, path: &str) -> Result<Vec<u8>, IsoError<R::Error>> {
        for n in 0..self.trees.len() {
            let Tree { names, root } = self.trees[n];
            if let Some(file) = self.find(names, root, path)? {
                return self.read_extent(file, FILE_BYTES_MAX);
            }
        }
        Err(IsoError::NotFound)
    }

    fn find(
        &mut self,
        names: Names,
        root: Extent,
        path: &str,
    ) -> Result<Option<Extent>, IsoError<R::Error>> {
        let mut at = root;
        for component in path.split('/') {
            match self.find_in(names, at, component)? {
                Some(extent) => at = extent,
                None => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    fn find_in(
        &mut self,
        names: Names,
        directory: Extent,
        name: &str,
    ) -> Result<Option<Extent>, IsoError<R::Error>> {
        let bytes = self.read_extent(directory, DIRECTORY_BYTES_MAX)?;
        for sector in bytes.chunks(SECTOR_BYTES) {
            for record in Records(sector) {
                let found = match names {
                    Names::Joliet => joliet_name(record).is_some_and(|candidate| candidate == name),
                    Names::Plain => self.is_named(record, name)?,
                };
                if found {
                    return Ok(extent_of(record));
                }
            }
        }
        Ok(None)
    }

    fn is_named(&mut self, record: &[u8], name: &str) -> Result<bool, IsoError<R::Error>> {
        if identifier(record)
            .is_some_and(|id| without_version(id).eq_ignore_ascii_case(name.as_bytes()))
        {
            return Ok(true);
        }
        Ok(self.rock_ridge_name(record)?.is_some_and(|candidate| candidate == name.as_bytes()))
    }

    /// The NM entries of a record's system use area and its continuations (SUSP 1.12, RRIP 1.12).
    fn rock_ridge_name(&mut self, record: &[u8]) -> Result<Option<Vec<u8>>, IsoError<R::Error>> {
        let Some(id) = identifier(record) else { return Ok(None) };
        let start = (33 + id.len()).next_multiple_of(2);
        let mut area = record.get(start..).unwrap_or(&[]).to_vec();
        let mut name = None;
        for _ in 0..CONTINUATIONS_MAX {
            match read_system_use(&area, &mut name) {
                Some((extent, offset))
                    if offset < SECTOR_BYTES && extent.bytes as usize <= SECTOR_BYTES - offset =>
                {
                    let end = offset + extent.bytes as usize;
                    let sector = self.read_extent(
                        Extent { bytes: SECTOR_BYTES as u32, ..extent },
                        FILE_BYTES_MAX,
                    )?;
                    area = sector[offset..end].to_vec();
                }
                _ => break,
            }
        }
        Ok(name)
    }

    fn read_extent(
        &mut self,
        extent: Extent,
        bytes_max: u32,
    ) -> Result<Vec<u8>, IsoError<R::Error>> {
        if extent.bytes > bytes_max {
            return Err(IsoError::TooLong);
        }
        let mut bytes = alloc::vec![0; (extent.bytes as usize).next_multiple_of(SECTOR_BYTES)];
        if !bytes.is_empty() {
            self.source.read_at(u64::from(extent.sector) * SECTOR_BYTES as u64, &mut bytes)?;
        }
        bytes.truncate(extent.bytes as usize);
        Ok(bytes)
    }
}

fn is_joliet(escape: &[u8]) -> bool {
    matches!(escape, b"%/@" | b"%/C" | b"%/E")
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn extent_of(record: &[u8]) -> Option<Extent> {
    Some(Extent { sector: u32_at(record, 2)?, bytes: u32_at(record, 10)? })
}

/// The directory records of one sector: none crosses into the next.
struct Records<'a>(&'a [u8]);

impl<'a> Iterator for Records<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let len = usize::from(*self.0.first()?);
        if len < 34 || len > self.0.len() {
            return None;
        }
        let (record, rest) = self.0.split_at(len);
        self.0 = rest;
        Some(record)
    }
}

fn identifier(record: &[u8]) -> Option<&[u8]> {
    let len = usize::from(*record.get(32)?);
    record.get(33..33 + len)
}

/// `NAME.EXT;1` without version and without the dot of an absent extension.
fn without_version(id: &[u8]) -> &[u8] {
    let id = id.split(|byte| *byte == b';').next().unwrap_or(id);
    id.strip_suffix(b".").unwrap_or(id)
}

fn joliet_name(record: &[u8]) -> Option<String> {
    let units =
        identifier(record)?.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]]));
    let name: String = char::decode_utf16(units).map(|unit| unit.unwrap_or('\u{FFFD}')).collect();
    Some(name.split(';').next().unwrap_or("").to_string())
}

/// Collects the name's parts; returns where the area continues.
fn read_system_use(mut area: &[u8], name: &mut Option<Vec<u8>>) -> Option<(Extent, usize)> {
    let mut continuation = None;
    while let [kind_a, kind_b, len, ..] = *area {
        let len = usize::from(len);
        if len < 4 || len > area.len() {
            break;
        }
        let (entry, rest) = area.split_at(len);
        match &[kind_a, kind_b] {
            b"NM" if len > 5 && entry[4] & 0b110 == 0 => {
                name.get_or_insert_with(Vec::new).extend_from_slice(&entry[5..]);
            }
            b"CE" => {
                if let (Some(sector), Some(offset), Some(bytes)) =
                    (u32_at(entry, 4), u32_at(entry, 12), u32_at(entry, 20))
                {
                    continuation = Some((Extent { sector, bytes }, offset as usize));
                }
            }
            b"ST" => break,
            _ => {}
        }
        area = rest;
    }
    continuation
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;

    struct Image(Vec<u8>);

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Beyond;

    impl ReadAt for Image {
        type Error = Beyond;

        fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), Beyond> {
            let start = usize::try_from(offset).map_err(|_| Beyond)?;
            let end = start.checked_add(buffer.len()).ok_or(Beyond)?;
            buffer.copy_from_slice(self.0.get(start..end).ok_or(Beyond)?);
            Ok(())
        }
    }

    fn record(name: &[u8], sector: u32, bytes: u32, system_use: &[u8]) -> Vec<u8> {
        let mut record = vec![0; 33];
        record[2..6].copy_from_slice(&sector.to_le_bytes());
        record[10..14].copy_from_slice(&bytes.to_le_bytes());
        record[32] = name.len() as u8;
        record.extend_from_slice(name);
        record.resize(record.len().next_multiple_of(2), 0);
        record.extend_from_slice(system_use);
        record.resize(record.len().next_multiple_of(2), 0);
        record[0] = record.len() as u8;
        record
    }

    fn ucs2(name: &str) -> Vec<u8> {
        name.encode_utf16().flat_map(u16::to_be_bytes).collect()
    }

    fn put(image: &mut [u8], sector: usize, bytes: &[u8]) {
        image[sector * SECTOR_BYTES..][..bytes.len()].copy_from_slice(bytes);
    }

    fn descriptor(kind: u8, label: &[u8], root: u32) -> Vec<u8> {
        let mut sector = vec![0; SECTOR_BYTES];
        sector[0] = kind;
        sector[1..6].copy_from_slice(b"CD001");
        sector[40..72].fill(b' ');
        sector[40..40 + label.len()].copy_from_slice(label);
        sector[128..130].copy_from_slice(&2048u16.to_le_bytes());
        let root = record(&[0], root, 2048, &[]);
        sector[156..190].copy_from_slice(&root);
        sector
    }

    /// `dir/meta_data.json` with the content `plain` and, in the Joliet tree, `joliet`.
    fn image(joliet: bool, rock_ridge: bool, continued: bool) -> Image {
        let mut image = vec![0; 30 * SECTOR_BYTES];
        put(&mut image, 16, &descriptor(1, b"config-2", 20));
        if joliet {
            let mut supplementary = descriptor(2, &ucs2("config-2"), 22);
            supplementary[88..91].copy_from_slice(b"%/E");
            put(&mut image, 17, &supplementary);
        }
        put(&mut image, if joliet { 18 } else { 17 }, &descriptor(255, b"", 0));
        put(
            &mut image,
            20,
            &[
                record(&[0], 20, 2048, &[]),
                record(&[1], 20, 2048, &[]),
                record(b"DIR", 21, 2048, &[]),
            ]
            .concat(),
        );
        let name_entries = [b"NM\x0a\x01\x01meta_".as_slice(), b"NM\x0e\x01\x00data.json"].concat();
        let mut system_use = Vec::new();
        if rock_ridge && continued {
            system_use.extend_from_slice(b"CE\x1c\x01");
            for value in [25u32, 100, name_entries.len() as u32] {
                system_use.extend_from_slice(&value.to_le_bytes());
                system_use.extend_from_slice(&value.to_be_bytes());
            }
            put(&mut image, 25, &[vec![0; 100], name_entries].concat());
        } else if rock_ridge {
            system_use = name_entries;
        }
        let plain_name: &[u8] = if rock_ridge { b"META_DAT.JSO;1" } else { b"META_DATA.JSON;1" };
        put(&mut image, 21, &record(plain_name, 24, 5, &system_use));
        put(&mut image, 22, &record(&ucs2("dir"), 23, 2048, &[]));
        put(&mut image, 23, &record(&ucs2("meta_data.json;1"), 26, 6, &[]));
        put(&mut image, 24, b"plain");
        put(&mut image, 26, b"joliet");
        Image(image)
    }

    #[test]
    fn files_are_found_under_every_kind_of_name() {
        for (joliet, rock_ridge, continued, content) in [
            (false, false, false, "plain"),
            (false, true, false, "plain"),
            (false, true, true, "plain"),
            (true, false, false, "joliet"),
            (true, true, true, "joliet"),
        ] {
            let mut volume = Volume::open(image(joliet, rock_ridge, continued)).unwrap();
            assert_eq!(volume.label(), "config-2");
            assert_eq!(volume.read("dir/meta_data.json").unwrap(), content.as_bytes());
            assert_eq!(volume.read("dir/user_data"), Err(IsoError::NotFound));
            assert_eq!(volume.read("none/meta_data.json"), Err(IsoError::NotFound));
        }
    }

    #[test]
    fn other_disks_are_refused() {
        assert!(matches!(Volume::open(Image(vec![0; 64 * SECTOR_BYTES])), Err(IsoError::NotIso)));
        assert!(matches!(Volume::open(Image(vec![0; 512])), Err(IsoError::Read(Beyond))));
    }

    #[test]
    fn damaged_volumes_end_in_errors() {
        let mut state = 1u64;
        for _ in 0..3000 {
            let mut damaged = image(state & 1 == 0, true, state & 2 == 0);
            for _ in 0..20 {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let sector = 16 + (state >> 33) as usize % 10;
                let at = sector * SECTOR_BYTES + (state >> 50) as usize % 200;
                damaged.0[at] = (state >> 20) as u8;
            }
            if let Ok(mut volume) = Volume::open(damaged) {
                let _ = volume.read("dir/meta_data.json");
            }
        }
    }
}
