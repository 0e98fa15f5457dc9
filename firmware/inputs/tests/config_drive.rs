//! Config drives as the storage crate's library writes them, read with the guest's reader.

use hadris_iso::joliet::JolietLevel;
use hadris_iso::read::PathSeparator;
use hadris_iso::rrip::RripOptions;
use hadris_iso::write::options::{BaseIsoLevel, CreationFeatures, IsoFormatOptions};
use hadris_iso::write::{File, InputFiles, IsoImageWriter};
use inputs::iso9660::{IsoError, ReadAt, Volume};
use std::io::Cursor;
use std::sync::Arc;

struct Image(Vec<u8>);

impl ReadAt for Image {
    type Error = &'static str;

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), &'static str> {
        let start = offset as usize;
        let bytes = self.0.get(start..start + buffer.len()).ok_or("beyond the end")?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }
}

fn file(name: &str, contents: &[u8]) -> File {
    File::File { name: Arc::new(name.into()), contents: contents.to_vec() }
}

fn directory(name: &str, children: Vec<File>) -> File {
    File::Directory { name: Arc::new(name.into()), children }
}

fn write(features: CreationFeatures, user_data: &[u8]) -> Image {
    let latest = directory(
        "latest",
        vec![
            file("meta_data.json", br#"{"uuid": "1234", "hostname": "web"}"#),
            file("network_data.json", b"{}"),
            file("user_data", user_data),
        ],
    );
    let files = InputFiles {
        path_separator: PathSeparator::ForwardSlash,
        files: vec![directory("openstack", vec![latest]), directory("ec2", vec![])],
    };
    let options = IsoFormatOptions {
        volume_name: "config-2".into(),
        sector_size: 2048,
        path_separator: PathSeparator::ForwardSlash,
        features,
        system_id: None,
        volume_set_id: None,
        publisher_id: None,
        preparer_id: None,
        application_id: None,
        strict_charset: false,
    };
    let mut image = Cursor::new(vec![0; 2 << 20]);
    IsoImageWriter::create(&mut image, files, options).expect("the image is written");
    Image(image.into_inner())
}

#[test]
fn every_way_of_writing_names_is_read() {
    let level2 = BaseIsoLevel::Level2 { supports_lowercase: true, supports_rrip: false };
    let level1_rrip = BaseIsoLevel::Level1 { supports_lowercase: false, supports_rrip: true };
    let rock_ridge = Some(RripOptions { enabled: true, ..Default::default() });
    let variants = [
        CreationFeatures { filenames: level2, ..Default::default() },
        CreationFeatures { joliet: Some(JolietLevel::Level3), ..Default::default() },
        CreationFeatures { filenames: level1_rrip, rock_ridge, ..Default::default() },
        CreationFeatures {
            filenames: level1_rrip,
            rock_ridge,
            joliet: Some(JolietLevel::Level3),
            ..Default::default()
        },
    ];
    let user_data = "#trine-steps\nprint hello\n".repeat(2000);
    for (n, features) in variants.into_iter().enumerate() {
        let mut volume = Volume::open(write(features, user_data.as_bytes())).expect("a volume");
        assert!(
            volume.label().eq_ignore_ascii_case("config-2"),
            "variant {n}: label {}",
            volume.label()
        );
        let read = volume
            .read("openstack/latest/user_data")
            .unwrap_or_else(|error| panic!("variant {n}: {error:?}"));
        assert!(read == user_data.as_bytes(), "variant {n}");
        assert!(volume.read("openstack/latest/meta_data.json").is_ok(), "variant {n}");
        assert_eq!(
            volume.read("openstack/latest/vendor_data.json"),
            Err(IsoError::NotFound),
            "variant {n}"
        );
    }
}
