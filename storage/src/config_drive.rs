//! A server's config drive: an ISO 9660 file system with the label and the paths that cloud-init
//! and our own guests look for.

use crate::control::{CONFIG_BYTES_MAX, CONFIG_FILES_MAX, Error};
use hadris_iso::joliet::JolietLevel;
use hadris_iso::read::PathSeparator;
use hadris_iso::rrip::RripOptions;
use hadris_iso::write::options::{BaseIsoLevel, CreationFeatures, IsoFormatOptions};
use hadris_iso::write::{InputEntry, InputTree, IsoImageWriter};
use std::collections::BTreeMap;
use std::io::Cursor;

/// The label that makes it a config drive.
const LABEL: &str = "config-2";
const SECTOR_BYTES: usize = 2048;
const PATH_BYTES_MAX: usize = 255;
/// ISO 9660 nests directories eight deep.
const DEPTH_MAX: usize = 7;
/// Longest name that Joliet keeps whole.
const NAME_BYTES_MAX: usize = 64;

/// A directory on its way into the image.
#[derive(Default)]
struct Folder {
    files: BTreeMap<String, Vec<u8>>,
    folders: BTreeMap<String, Folder>,
}

/// The image of a config drive with `files` (content by path).
pub fn image(files: BTreeMap<String, Vec<u8>>) -> Result<Vec<u8>, Error> {
    check(&files)?;
    let mut root = Folder::default();
    for (path, content) in files {
        root.insert(&path, content)?;
    }
    let tree = InputTree::new(PathSeparator::ForwardSlash, root.into_entries());
    let mut image = Cursor::new(Vec::new());
    IsoImageWriter::create(&mut image, tree, options())
        .map_err(|error| Error::invalid(format!("make a config drive: {error}")))?;
    let mut image = image.into_inner();
    image.resize(image.len().next_multiple_of(SECTOR_BYTES), 0);
    Ok(image)
}

fn options() -> IsoFormatOptions {
    IsoFormatOptions {
        volume_name: LABEL.to_owned(),
        system_id: None,
        volume_set_id: None,
        publisher_id: None,
        preparer_id: None,
        application_id: None,
        sector_size: SECTOR_BYTES,
        path_separator: PathSeparator::ForwardSlash,
        features: CreationFeatures {
            filenames: BaseIsoLevel::Level1 { supports_lowercase: false, supports_rrip: true },
            joliet: Some(JolietLevel::Level3),
            rock_ridge: Some(RripOptions::default()),
            ..CreationFeatures::default()
        },
        // Lower case is what the label is made of; only the strict form forbids it.
        strict_charset: false,
    }
}

fn check(files: &BTreeMap<String, Vec<u8>>) -> Result<(), Error> {
    let bytes: usize = files.values().map(Vec::len).sum();
    if files.len() > CONFIG_FILES_MAX || bytes > CONFIG_BYTES_MAX {
        return Err(Error::invalid(format!(
            "config drive of {} files and {bytes} bytes: at most {CONFIG_FILES_MAX} files and \
             {CONFIG_BYTES_MAX} bytes fit",
            files.len()
        )));
    }
    files.keys().try_for_each(|path| check_path(path))
}

fn check_path(path: &str) -> Result<(), Error> {
    let plain = |name: &str| {
        !name.is_empty()
            && name.len() <= NAME_BYTES_MAX
            && name != "."
            && name != ".."
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
    };
    if path.len() <= PATH_BYTES_MAX
        && path.split('/').count() <= DEPTH_MAX
        && path.split('/').all(plain)
    {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "config drive path {path:?}: must be relative, at most {DEPTH_MAX} names of 1 to \
         {NAME_BYTES_MAX} letters, digits, '.', '_' or '-'"
    )))
}

impl Folder {
    fn insert(&mut self, path: &str, content: Vec<u8>) -> Result<(), Error> {
        let taken =
            |name: &str| Error::invalid(format!("config drive: {name:?} is a file and a folder"));
        match path.split_once('/') {
            None if self.folders.contains_key(path) => Err(taken(path)),
            None => {
                self.files.insert(path.to_owned(), content);
                Ok(())
            }
            Some((name, _)) if self.files.contains_key(name) => Err(taken(name)),
            Some((name, rest)) => {
                self.folders.entry(name.to_owned()).or_default().insert(rest, content)
            }
        }
    }

    fn into_entries(self) -> Vec<InputEntry> {
        let folders = self
            .folders
            .into_iter()
            .map(|(name, folder)| InputEntry::directory(name, folder.into_entries()));
        let files = self.files.into_iter().map(|(name, content)| InputEntry::file(name, content));
        folders.chain(files).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(paths: &[&str]) -> BTreeMap<String, Vec<u8>> {
        paths.iter().map(|path| ((*path).to_owned(), b"body".to_vec())).collect()
    }

    #[test]
    fn carries_the_label_where_blkid_looks() {
        let image = image(files(&["openstack/latest/meta_data.json"])).unwrap();
        let primary = &image[16 * SECTOR_BYTES..17 * SECTOR_BYTES];
        assert_eq!(primary[0], 1);
        assert_eq!(&primary[1..6], b"CD001");
        assert_eq!(&primary[40..72], format!("{LABEL:<32}").as_bytes());
        assert_eq!(image.len() % SECTOR_BYTES, 0);
    }

    #[test]
    fn refuses_a_path_that_leaves_the_drive() {
        for path in ["/etc/passwd", "../x", "a//b", "a/./b", "", "a\0b", "1/2/3/4/5/6/7/8"] {
            assert!(image(files(&[path])).is_err(), "{path:?}");
        }
    }

    #[test]
    fn refuses_a_name_that_is_a_file_and_a_folder() {
        assert!(image(files(&["a", "a/b"])).is_err());
    }
}
