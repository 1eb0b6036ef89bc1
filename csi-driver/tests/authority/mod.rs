//! Certificates for controllers and nodes.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use tempfile::TempDir;

/// An authority, and directories with certificates of it.
pub struct Authority {
    directory: TempDir,
    issuer: Issuer<'static, KeyPair>,
    pub pem: String,
}

impl Authority {
    pub fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let pem = params.self_signed(&key).unwrap().pem();
        Self { directory: tempfile::tempdir().unwrap(), issuer: Issuer::new(params, key), pem }
    }

    /// Certificates for one side.
    pub fn issue(&self, name: &str) -> PathBuf {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let directory = self.directory.path().join(name);
        write(&directory, &self.pem, &certificate.pem(), &key.serialize_pem());
        directory
    }
}

pub fn write(directory: &Path, ca: &str, certificate: &str, key: &str) {
    std::fs::create_dir_all(directory).unwrap();
    std::fs::write(directory.join("ca.pem"), ca).unwrap();
    std::fs::write(directory.join("cert.pem"), certificate).unwrap();
    std::fs::write(directory.join("key.pem"), key).unwrap();
}
