"""Encryption of the connections, and with a client CA also who may connect.

The files are looked at with each new connection, so that a renewed certificate needs no restart.
"""

import ssl

import grpc

from aqt_server.security.watched import Watched
from aqt_server.settings import Tls


class CertificateError(Exception):
    """The certificate, its key or the client CA cannot be used."""


class Certificates:
    """The server's certificate, its key, and the CA of clients if they must have certificates.

    Raises:
      CertificateError: a file cannot be read, or the key is not the certificate's.
    """

    def __init__(self, tls: Tls):
        assert tls.tls_certificate
        assert tls.tls_key
        self._certificate = tls.tls_certificate
        self._key = tls.tls_key
        self._ca = tls.tls_client_ca
        files = [f for f in (self._certificate, self._key, self._ca) if f]
        try:
            self._context = Watched(files, self._read_context)
        except OSError as error:  # which ssl's errors are too
            raise CertificateError(
                f"--tls-certificate {self._certificate}, --tls-key {self._key} and --tls-client-ca "
                f"{self._ca or '(none)'} cannot be used: {error}"
            ) from error
        self._pem = Watched(files, self._read_pem)

    def for_grpc(self) -> grpc.ServerCredentials:
        """What gRPC needs; it asks for the files' content with each handshake."""
        return grpc.dynamic_ssl_server_credentials(
            self._pem.value,
            lambda: self._pem.value,
            require_client_authentication=self._ca is not None,
        )

    def for_http(self) -> ssl.SSLContext:
        """What asyncio needs; each handshake goes on with a context of the files' content."""
        context = self._read_context()

        def renew(
            connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, of: ssl.SSLContext
        ) -> None:
            connection.context = self._context.value

        context.sni_callback = renew  # also called where the client names no server
        return context

    def _read_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self._certificate, self._key)
        if self._ca:
            context.load_verify_locations(self._ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _read_pem(self) -> grpc.ServerCertificateConfiguration:
        # Checked: gRPC would take a pair that does not fit, and then refuse every connection.
        self._read_context()
        return grpc.ssl_server_certificate_configuration(
            [(self._key.read_bytes(), self._certificate.read_bytes())],
            root_certificates=self._ca.read_bytes() if self._ca else None,
        )
