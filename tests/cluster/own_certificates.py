"""Certificates as a user makes them with a CA of their own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from upipe.settings import Certificates


class Authority:
    """A CA, and files of what it signs, in a directory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        (directory / "ca.pem").write_bytes(self._signed("Our CA", self._key, (), timedelta(days=99)))

    def sign(self, name: str, *addresses: str, life: timedelta = timedelta(days=1)) -> Certificates:
        """Files for one host or person: NAME.pem and NAME.key; again replaces them.

        Args:
            addresses: IP addresses at which it is dialled.
            life: from now; a negative one has expired.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        files = Certificates(*(str(self._directory / file) for file in ("ca.pem", f"{name}.pem", f"{name}.key")))
        Path(files.key).touch(0o600)
        Path(files.key).write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        Path(files.certificate).write_bytes(self._signed(name, key, addresses, life))
        return files

    def _signed(self, name: str, key: ec.EllipticCurvePrivateKey, addresses: tuple[str, ...], life: timedelta) -> bytes:
        issuer, subject = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, one)]) for one in ("Our CA", name))
        now, authority = datetime.now(UTC), name == "Our CA"
        names = [x509.DNSName(f"{name.replace(' ', '-')}.example"), *(x509.IPAddress(ip_address(a)) for a in addresses)]
        return (
            x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(days=2))
            .not_valid_after(now + life)
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, SHA256())
            .public_bytes(Encoding.PEM)
        )
